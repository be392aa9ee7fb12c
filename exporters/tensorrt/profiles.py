"""Optimization profiles: for which sizes of its dynamic dimensions an engine is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onelora_compile.errors import ConfigError
from onelora_compile.printable import shortened

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]  # smallest, most usual, largest
Profile = dict[str, ShapeRange]
Dims = tuple[int | str, ...]  # a name, "?" without one, where a dimension is dynamic


def profiles_of(inputs: Mapping[str, Dims], shapes: Any) -> list[Profile]:
    """The profiles that `shapes` asks for: one, or one for each mapping of a list.

    Args:
        inputs: dimensions of each input; names where they are dynamic.
        shapes: {"input": (min, opt, max)}, each a shape; or {"dimension": (1, 8, 32)}, which goes into every input that
            has it; a single shape or number is all three. Inputs that are not named take what their dimensions' names
            are elsewhere.

    Raises:
        ConfigError: a dynamic input that lacks sizes, an unknown name, or sizes that do not fit; it says which.
    """
    dynamic = {name: dims for name, dims in inputs.items() if any(isinstance(size, str) for size in dims)}
    asked: Sequence[Any] = [shapes or {}] if shapes is None or isinstance(shapes, Mapping) else list(shapes)
    if not dynamic and not any(asked):
        return []
    return [_profile(inputs, dynamic, one) for one in asked]


def _profile(inputs: Mapping[str, Dims], dynamic: Mapping[str, Dims], shapes: Mapping[str, Any]) -> Profile:
    named = {size for dims in dynamic.values() for size in dims if isinstance(size, str) and size != "?"}
    if unknown := [key for key in shapes if key not in inputs and key not in named]:
        dimensions = f"; its dynamic dimensions: {shortened(sorted(named))}" if named else ""
        raise ConfigError(f"shapes names {shortened(unknown)}; the model's inputs are {shortened(inputs)}{dimensions}")
    sizes = {key: sizes_of(key, value) for key, value in shapes.items() if key not in inputs}
    profile: Profile = {}
    for name in (key for key in shapes if key in inputs):
        profile[name] = _fitting(name, inputs[name], shapes[name])
        for axis, size in enumerate(inputs[name]):
            if isinstance(size, str) and size != "?":
                low, usual, high = (shape[axis] for shape in profile[name])
                sizes.setdefault(size, (low, usual, high))
    for name, dims in dynamic.items():
        if name not in profile and all(size in sizes for size in dims if isinstance(size, str)):
            smallest, middle, largest = (
                tuple(sizes[size][which] if isinstance(size, str) else size for size in dims) for which in range(3)
            )
            profile[name] = (smallest, middle, largest)
    if missing := {name: dims for name, dims in dynamic.items() if name not in profile}:
        listed = ", ".join(f"{name} [{', '.join(map(str, dims))}]" for name, dims in missing.items())
        name, dims = next(iter(missing.items()))
        example = tuple(tuple(size if isinstance(size, int) else n for size in dims) for n in (1, 8, 32))
        raise ConfigError(
            f"dynamic inputs need the smallest, the usual and the largest shape; missing for {listed}. "
            f"For example shapes={{{name!r}: {example}}}, or by dimension: shapes={{'batch': (1, 8, 32)}}, "
            "--size batch=1,8,32 on the command line"
        )
    # A static input needs no profile; naming one is harmless and was checked.
    return {name: one for name, one in profile.items() if name in dynamic}


def _fitting(name: str, dims: Dims, value: Any) -> ShapeRange:
    found = _three(name, value)
    for shape in found:
        if len(shape) != len(dims):
            raise ConfigError(f"shapes[{name!r}]: {shape} has {len(shape)} dimensions; the input is {_text(dims)}")
        if any(isinstance(size, int) and size != given for size, given in zip(dims, shape, strict=True)):
            raise ConfigError(f"shapes[{name!r}]: {shape} changes a fixed dimension of {_text(dims)}")
    return found


def _three(name: str, value: Any) -> ShapeRange:
    """(min, opt, max) of three shapes, or of one, which is all three."""
    try:
        several = bool(value) and not isinstance(value[0], int)
        parts = [tuple(int(size) for size in shape) for shape in value] if several else [tuple(map(int, value))] * 3
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"shapes[{name!r}] is {value!r}, neither three shapes nor one: {error}") from None
    if len(parts) != 3:
        raise ConfigError(f"shapes[{name!r}] has {len(parts)} shapes: give the smallest, the usual and the largest")
    low, usual, high = parts
    if not len(low) == len(usual) == len(high):
        raise ConfigError(f"shapes[{name!r}]: {low}, {usual}, {high} have different numbers of dimensions")
    for triple in zip(low, usual, high, strict=True):
        _check_order(name, triple)
    return low, usual, high


def sizes_of(name: str, value: Any) -> tuple[int, int, int]:
    """(min, opt, max) of a dimension, or of one number, which is all three."""
    numbers = [value] * 3 if isinstance(value, int) else value
    if isinstance(numbers, list | tuple) and all(isinstance(one, list | tuple) and len(one) == 1 for one in numbers):
        numbers = [one[0] for one in numbers]  # shapes of one axis, as the command line has them
    if not isinstance(numbers, list | tuple) or len(numbers) != 3 or not all(isinstance(one, int) for one in numbers):
        raise ConfigError(f"shapes[{name!r}] is {value!r}: a dimension takes three numbers, (1, 8, 32), or one")
    low, usual, high = numbers
    _check_order(name, (low, usual, high))
    return low, usual, high


def _check_order(name: str, sizes: tuple[int, ...]) -> None:
    if not 0 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise ConfigError(f"shapes[{name!r}]: {', '.join(map(str, sizes))} is not smallest, usual, largest")


def _text(dims: Dims) -> str:
    return f"[{', '.join(map(str, dims))}]"
