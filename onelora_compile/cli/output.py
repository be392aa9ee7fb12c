"""What the command line prints: tables in any locale, JSON alone on its stream, and each mistake as one line."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onelora_compile.cli.mistakes import described
from onelora_compile.errors import OneLoRAError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onelora_compile.printable import Printable

TRACEBACK = "ONELORA_TRACEBACK"
_LONGEST = 800  # torch.export explains itself on several screens
# One character for one: columns stay in line.
_ASCII = {"…": "~", "–": "-", "—": "-", "ᵀ": "T", "·": "*", "×": "x", "→": ">", "≤": "<", "⊗": "*", "’": "'"}
_HANDLER = "onelora.terminal"


def print_report(report: RenderableType) -> None:
    """Print for people; brackets are what they are, no markup, and what is too wide is not cut off."""
    from rich.console import Console

    Console(markup=False, emoji=False).print(report, highlight=False, crop=False)


def print_json(report: Printable) -> None:
    """Print for programs: one object, in ASCII."""
    print(json.dumps(report.to_dict(), indent=1, allow_nan=False))


@contextlib.contextmanager
def quiet_stdout(quiet: bool) -> Iterator[None]:
    """Send what is printed inside to standard error, whoever prints: the user's code, libraries in C."""
    if not quiet:
        yield
        return
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a stream that the caller closed
            kept = os.dup(1)
            os.dup2(2, 1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield


def fail(error: BaseException) -> None:
    """Print a mistake on standard error as one line; raise it again if the environment asks for tracebacks."""
    if os.environ.get(TRACEBACK):
        raise error
    expected = isinstance(error, (OneLoRAError, OSError))
    text = str(error) if expected else f"{described(error)} ({TRACEBACK}=1 shows where)"
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    console.print(f"error: {one_line(text) or type(error).__name__}", style="red", soft_wrap=True)


def one_line(text: str) -> str:
    """A text without line breaks, and not longer than can be read."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} … ({TRACEBACK}=1 shows all of it)"


def print_in_any_locale() -> None:
    """Let the standard streams replace what their encoding has no character for, instead of an exception."""
    codecs.register_error(_HANDLER, _replaced)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    one = error.object[error.start]
    if "\udc80" <= one <= "\udcff":  # a byte of a file name that is no text: as it was
        return bytes([ord(one) - 0xDC00]), error.start + 1
    return _ASCII.get(one, "?"), error.start + 1
