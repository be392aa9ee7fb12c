"""Tables whose names stay whole on a narrow terminal, and one row for equal layers.

rich breaks a word wherever a column ends. A name that is broken so can't be read, and not be copied. Here a cell is
broken at spaces, and a dotted name or a path before one of its parts. A table that is still too wide is wider than the
terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from rich import table
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

T = TypeVar("T")
_PART = re.compile(r"(?<=[./\\])(?=[A-Za-z_{])")  # not inside of 1.5e-03 or 2.13.0


class Cell:
    """A text that is broken only at spaces and before the parts of a name."""

    def __init__(self, text: str, style: str = "") -> None:
        self._lines = text.split("\n")
        self._style = style

    @property
    def narrowest(self) -> int:
        """The columns that its longest part takes."""
        return max(Text(part).cell_len for line in self._lines for part in _parts(line))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(Text(line).cell_len for line in self._lines)
        return Measurement(self.narrowest, widest).with_maximum(max(options.max_width, self.narrowest))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            for short in _broken(line, options.max_width):
                yield Text(short, style=self._style, no_wrap=True, overflow="ignore")


class Table(table.Table):
    """rich's table of such cells."""

    def __init__(self, *headers: Any, title: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=Cell(title, "table.title") if title else None, **options)  # type: ignore[arg-type]

    def add_column(self, header: RenderableType = "", *args: Any, **options: Any) -> None:
        """As rich's; a column is never narrower than a word of its header."""
        super().add_column(header, *args, **options)
        if isinstance(header, str):
            self.columns[-1].min_width = Cell(header).narrowest

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """As rich's; its columns are never narrower than the longest part of a name in them."""
        made = [Cell(one) if isinstance(one, str) else one for one in cells]
        super().add_row(*made, **options)
        for column, cell in zip(self.columns, made, strict=False):
            if isinstance(cell, Cell):
                column.min_width = max(column.min_width or 0, cell.narrowest)


def grouped(rows: Iterable[tuple[str, T]], alike: Callable[[T], Hashable] = lambda row: None) -> dict[str, list[T]]:
    """Rows under a name that stands for all of them, `layer.{0..11}.query`.

    Names are grouped that differ in one number between dots, or in several that take all combinations.

    Args:
        rows: the name and what else is in the row.
        alike: of what else is in a row, that which has to be equal in a group.
    """
    groups: dict[tuple[tuple[str, ...], Hashable], list[T]] = {}
    for name, row in rows:
        groups.setdefault((tuple(name.split(".")), alike(row)), []).append(row)
    for place in range(max((len(parts) for parts, _ in groups), default=0)):
        groups = _collapsed(groups, place)
    found: dict[str, list[T]] = {}
    for (parts, _), members in groups.items():
        found.setdefault(".".join(parts), []).extend(members)
    return found


def spread(values: Sequence[float], form: str) -> str:
    """The numbers of a group: one, or the smallest and the largest."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _collapsed(
    groups: dict[tuple[tuple[str, ...], Hashable], list[T]], place: int
) -> dict[tuple[tuple[str, ...], Hashable], list[T]]:
    """Those groups as one that differ in the number at one place of their names."""
    same: dict[Hashable, list[tuple[tuple[str, ...], Hashable]]] = {}
    for key in groups:
        parts, rest = key
        number = place < len(parts) and parts[place].isdecimal()
        same.setdefault((parts[:place], parts[place + 1 :], rest) if number else key, []).append(key)
    found = {}
    for keys in same.values():
        parts, rest = keys[0]
        if len(keys) > 1:
            parts = (*parts[:place], _numbers([int(one[place]) for one, _ in keys]), *parts[place + 1 :])
        found[parts, rest] = [row for key in keys for row in groups[key]]
    return found


def _numbers(values: list[int]) -> str:
    """`{0..3,5}` of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return "{" + ",".join(texts) + "}"


def _parts(line: str) -> list[str]:
    return [part for word in line.split(" ") for part in _PART.split(word)]


def _broken(line: str, width: int) -> list[str]:
    """A line as lines that fit, where its parts do."""
    lines = [""]
    for word in line.split(" "):
        room = width - Text(lines[-1]).cell_len - (1 if lines[-1] else 0)
        if Text(word).cell_len <= room:
            lines[-1] += f" {word}" if lines[-1] else word
            continue
        if lines[-1]:
            lines.append("")
        for part in _PART.split(word):
            if lines[-1] and Text(lines[-1] + part).cell_len > width:
                lines.append("")
            lines[-1] += part
    return lines
