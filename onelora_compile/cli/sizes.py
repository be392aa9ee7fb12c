"""Sizes and dynamic axes as the command line takes them: one grammar for every command.

    NAME=SIZE            batch=8             x=8x3x224x224
    NAME=SIZE,SIZE,SIZE  batch=1,8,32        x=1x3x224x224,8x3x224x224,32x3x224x224    smallest, usual, largest
    AXIS=NAME            0=batch             that axis of every input
    INPUT:AXIS=NAME      input_ids:1=tokens  of one input

NAME of a size is that of a dynamic dimension or of an input.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from onelora_compile.errors import ConfigError

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]  # smallest, usual, largest; a dimension's have one axis

EXAMPLES = "batch=8, batch=1,8,32 (smallest, usual, largest) or x=1x3,8x3,32x3"
_AXIS = re.compile(r"(?:(?P<input>[^:=]+):)?(?P<axis>[0-9]+)=(?P<name>[A-Za-z_][A-Za-z0-9_]*)")


@dataclasses.dataclass(frozen=True)
class DynamicAxis:
    """An axis whose size is free in the exported model, and its name there; of every input if `input` is None."""

    input: str | None
    axis: int
    name: str


def parse_sizes(texts: Iterable[str], option: str = "--size") -> dict[str, ShapeRange]:
    """The range of each name.

    Raises:
        ConfigError: a text that is not of the grammar, sizes that don't ascend, or a name that is given twice.
    """
    found: dict[str, ShapeRange] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")  # names that tools give hold "="; sizes do not
        parts = [one.split("x") for one in sizes.split(",")]
        numbers = all(size.isascii() and size.isdigit() for part in parts for size in part)
        if not name or not numbers or len(parts) not in (1, 3):
            raise ConfigError(f"{option} {text!r} is not of the form {EXAMPLES}")
        if name in found:
            raise ConfigError(f"{option} gives {name!r} twice")
        shapes = [tuple(map(int, part)) for part in parts] * (3 // len(parts))
        low, usual, high = shapes
        if not len(low) == len(usual) == len(high):
            raise ConfigError(f"{option} {text!r}: the three have different numbers of axes")
        if any(not 0 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
            raise ConfigError(f"{option} {text!r} is not smallest, usual, largest")
        found[name] = (low, usual, high)
    return found


def each_size(sizes: dict[str, ShapeRange]) -> Iterator[dict[str, Shape]]:
    """Smallest, usual and largest of all names together; once what is the same."""
    cases = [{name: shapes[which] for name, shapes in sizes.items()} for which in range(3)]
    yield from (case for index, case in enumerate(cases) if case not in cases[:index])


def parse_axes(texts: Sequence[str], option: str = "--dynamic") -> list[DynamicAxis]:
    """The dynamic axes.

    Raises:
        ConfigError: a text that is not of the grammar.
    """
    found = []
    for text in texts:
        match = _AXIS.fullmatch(text)
        if match is None:
            raise ConfigError(f"{option} {text!r} is not of the form 0=batch (of every input) or input_ids:1=tokens")
        found.append(DynamicAxis(match["input"], int(match["axis"]), match["name"]))
    return found
