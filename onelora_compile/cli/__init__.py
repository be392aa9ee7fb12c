"""The command line `onelora`."""

from onelora_compile.cli.commands import app, main

__all__ = ["app", "main"]
