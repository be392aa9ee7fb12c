"""The command line `onelora`: what all commands have in common.

Nothing here imports PyTorch before a command runs: help, version and shell completion answer at once.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onelora_compile.cli.output import fail, print_in_any_locale, print_json, print_report, quiet_stdout
from onelora_compile.errors import ConfigError
from onelora_compile.file_names import as_file, check_there
from onelora_compile.version import __version__

if TYPE_CHECKING:
    from onelora_compile.printable import Printable

Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        help="Of a dynamic dimension, batch=8, or an input, x=8x3; or smallest, usual, largest: batch=1,8,32.",
    ),
]


def file_to_write(help: str) -> Any:
    """The option `--output`; a name that ends in a separator is refused, where click's own type would drop that."""
    return typer.Option("--output", "-o", help=help, metavar="PATH", parser=_file)


def _file(given: str) -> Path:
    try:
        return as_file(given, "it")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


Output = Annotated[Path, file_to_write("The file to write.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object, and nothing else.")]
_Report = Callable[..., "Printable"]

app = typer.Typer(
    help="1LoRA: one trained vector per frozen linear, compiled into training and folded into deployed models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def command(*examples: str) -> Callable[[_Report], _Report]:
    """A function as a command: its report is printed, or with `--json` is data.

    A report with `passed` that is false is exit code 1.

    Args:
        examples: command lines for its help.
    """

    def register(function: _Report) -> _Report:
        @functools.wraps(function)
        def run(*, json: bool, **given: Any) -> None:
            with quiet_stdout(json):
                report = function(**given)
            (print_json if json else print_report)(report)
            if not getattr(report, "passed", True):
                raise typer.Exit(1)

        hints = _parameter_hints(function) | {"json": _Json}
        own = inspect.signature(function).parameters.values()
        parameters = [one.replace(annotation=hints[one.name]) for one in own]
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Json))
        # Typer reads both.
        run.__annotations__ = hints
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        title = "Example:" if len(examples) == 1 else "Examples:"
        short = re.split(r"[,;:(.]", inspect.getdoc(function) or "")[0]  # longer ones are cut off in the list
        app.command(short_help=short, epilog="\b\n" + "\n".join([title, *(f"  {one}" for one in examples)]))(run)
        return function

    return register


def _parameter_hints(function: _Report) -> dict[str, Any]:
    """The annotations of a command's parameters; its report's class is there for type checkers alone."""
    texts = {name: one for name, one in inspect.get_annotations(function).items() if name != "return"}
    holder = types.SimpleNamespace(__annotations__=texts)
    return typing.get_type_hints(holder, vars(sys.modules[function.__module__]), include_extras=True)


def load_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a .npz file by name.

    Raises:
        ConfigError: it is something else.
        OSError: it can't be read.
    """
    import numpy as np

    check_there(path)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError:
        raise
    except Exception as error:  # of zipfile, zlib, pickle and NumPy
        raise ConfigError(f"{path} is not a .npz file of arrays: {error}") from None


def _before_an_empty_one(arguments: Sequence[str]) -> str:
    """What stands before an argument that is empty, which a path would take for the folder "."; "" if there is none."""
    for before, one in itertools.pairwise(["onelora", *arguments]):
        if not one.strip():
            return before
        if match := re.fullmatch(r"(--[\w-]+=)\s*", one):
            return match[1]
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 1 after a mistake, 2 after wrong usage, with one line on standard error."""
    print_in_any_locale()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:  # typer takes pydantic to read a flag
        print(__version__)
        sys.exit(0)
    if before := _before_an_empty_one(given):
        fail(ConfigError(f"nothing stands after {before!r} but an empty argument: is a variable of the shell not set?"))
        sys.exit(2)
    try:
        sys.exit(app(arguments, prog_name="onelora", standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a mistake in the command's words has it
            fail(error)
            sys.exit(1)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
        else:
            words = getattr(getattr(error, "ctx", None), "command_path", "onelora")
            fail(ConfigError(f"{error.format_message()} ({words} --help shows what it takes)"))
        sys.exit(2)
