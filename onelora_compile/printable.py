"""Reports that print: `str(report)` is the text of its rich rendering, `report.to_dict()` the same as data."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType


class Printable:
    """A report whose `__rich__` is also what `print` shows, without colours."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, markup=False, emoji=False)  # brackets are what they are
        console.print(self.__rich__(), crop=False)  # what is too wide is not cut off
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it: its fields and properties by name.

        Paths and dtypes are texts. JSON has no NaN and no infinity: those are None.
        """
        found: dict[str, Any] = _plain(self)
        return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, os.PathLike)):
        return str(value)
    if dataclasses.is_dataclass(value):
        # Without what a field keeps for code alone, as the graphs of an explanation.
        names = [field.name for field in dataclasses.fields(value) if field.repr]
        names += [name for name, held in vars(type(value)).items() if isinstance(held, property)]
        return {name: _plain(getattr(value, name)) for name in names if not name.startswith("_")}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item())  # a number of NumPy or torch
    return str(value).removeprefix("torch.")


def shortened(names: Iterable[str], most: int = 10) -> str:
    """A list of names for a message: the first few, and how many more; "none" of an empty one."""
    found = [name or "the model itself" for name in names]
    more = f", … ({len(found) - most} more)" if len(found) > most else ""
    return (", ".join(found[:most]) or "none") + more


def bytes_text(count: float) -> str:
    """A number of bytes for people: 1.5 kB is 1500 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def percent(share: float, digits: int = 1) -> str:
    """A share for people: none that is not nothing or all is shown as 0 % or 100 %."""
    least = 10.0 ** -(digits + 2)
    if 0 < share < least / 2:
        return f"<{least:.{digits}%}"
    if 1 - least / 2 <= share < 1:
        return f">{1 - least:.{digits}%}"
    return f"{share:.{digits}%}"
