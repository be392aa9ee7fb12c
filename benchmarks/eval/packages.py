"""Packages with weights and data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from onelora_compile.errors import MissingExtraError


def folder_of(module: str, purpose: str) -> Path:
    """Where a package is; it is not imported.

    Args:
        module: the name to import.
        purpose: what it is needed for, as the end of "… is needed to".

    Raises:
        MissingExtraError: it is not installed; the message says how to do that.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise MissingExtraError(
            f"{module!r} is needed to {purpose} and is not installed: "
            "pip install --no-deps -r benchmarks/eval/packages.txt"
        )
    return Path(found.origin).parent
