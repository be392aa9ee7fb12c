"""What a model takes for one example: checked for each request, so that a wrong one never meets a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from onelora_compile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Field:
    """One input.

    Attributes:
        dtype: of its numbers.
        shape: without the batch; None for an axis whose size the request chooses.
    """

    dtype: np.dtype
    shape: tuple[int | None, ...]

    def read(self, name: str, value: Any) -> np.ndarray:
        """The array of nested lists.

        Raises:
            ConfigError: no numbers, numbers of another kind, or another shape.
        """
        try:
            given = np.asarray(value)
        except ValueError:
            raise ConfigError(f"{name!r} is no array: its lists have different lengths") from None
        if not given.size or not np.can_cast(given.dtype, self.dtype, "same_kind"):
            raise ConfigError(f"{name!r} is {given.dtype} {list(given.shape)}; the model takes {self}")
        if given.ndim != len(self.shape) or any(
            size not in (None, own) for size, own in zip(self.shape, given.shape, strict=True)
        ):
            raise ConfigError(f"{name!r} has the shape {list(given.shape)}; the model takes {self}")
        return given.astype(self.dtype)

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} [{sizes}] for each example"


def read_inputs(fields: Mapping[str, Field], given: Any) -> dict[str, np.ndarray]:
    """The arrays of one example.

    Args:
        fields: the inputs of the model.
        given: of a request: nested lists by name, or the lists alone where the model has one input.

    Raises:
        ConfigError: not what the model takes.
    """
    if not isinstance(given, Mapping) and len(fields) == 1:
        given = {next(iter(fields)): given}
    if not isinstance(given, Mapping) or set(given) != set(fields):
        found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ConfigError(f"the model takes the inputs {sorted(fields)}; the request has {found}")
    return {name: field.read(name, given[name]) for name, field in fields.items()}
