"""The command line `onelora`."""

# isort: off
# Each of the three files adds its commands to the app; help lists them in this order.
from onelora_compile.cli import models, engines, machine
from onelora_compile.cli.typer_app import app, main

__all__ = ["app", "engines", "machine", "main", "models"]
