"""A mistake as one line, with the place in the user's code."""

from __future__ import annotations

import os
import traceback


def described(error: BaseException) -> str:
    """The class of an exception, the line of code that raised it, and what it says."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__} at {_place(error.filename, error.lineno)}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    # The last line that the user can change: neither installed nor part of Python or of this package.
    theirs = [frame for frame in frames if not _installed(frame.filename)]
    place = f" at {_place(theirs[-1].filename, theirs[-1].lineno)}" if theirs else ""
    return f"{type(error).__name__}{place}: {error}".rstrip(": ")


def _place(file: str | None, line: int | None) -> str:
    return f"{os.path.basename(file or '?')}:{line}"


def _installed(file: str) -> bool:
    own, python = os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__)
    beside = [os.path.join(os.path.dirname(own), name) for name in ("passes", "exporters")]  # in a source tree
    return file.startswith((own, *beside, python, "<")) or "site-packages" in file
