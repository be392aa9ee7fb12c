"""Run the example and print its table (two minutes)."""

from rich.console import Console

from onelora_compile.examples.digits.run import compare

Console().print(compare())
