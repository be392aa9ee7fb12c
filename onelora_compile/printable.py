"""Reports that print: `str(report)` is the text of its rich rendering."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType


class Printable:
    """A report whose `__rich__` is also what `print` shows, without colours."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, markup=False)  # brackets are what they are
        console.print(self.__rich__())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


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
