"""Ranges of dynamic inputs: (smallest, best, largest) shape of each, TensorRT's optimization profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onelora_compile.errors import ConfigError

if TYPE_CHECKING:
    import onnx_ir

Shapes = Mapping[str, Sequence[Sequence[int] | int]]
Profiles = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profiles_of(model: onnx_ir.Model, shapes: Shapes | None) -> Profiles:
    """The range of every dynamic input.

    Args:
        model: the model.
        shapes: smallest, best and largest shape of an input, or three sizes of a dynamic dimension.

    An input whose dynamic sizes all have names that a given input has too needs no range of its own.

    Raises:
        ConfigError: an unknown input, shapes that do not fit it or each other, or a dynamic input without a range.
    """
    dims = {str(value.name): _dims(value) for value in model.graph.inputs}
    profiles: Profiles = {}
    sizes: dict[str, tuple[int, ...]] = {}
    dynamic = {dim for axes in dims.values() for dim in axes if isinstance(dim, str)}
    for name, given in (shapes or {}).items():
        if name not in dims and name not in dynamic:
            also = f", and the dynamic dimensions {', '.join(sorted(dynamic))}" if dynamic else ""
            raise ConfigError(f"shapes: the model has no input {name!r}; it has {', '.join(dims)}{also}")
        ranges = _three(name, given)
        if name not in dims:
            _set_size(sizes, name, tuple(size for shape in ranges for size in shape))
            continue
        for axis, dim in enumerate(dims[name]):
            if any(len(shape) != len(dims[name]) for shape in ranges):
                raise ConfigError(f"shapes of {name!r}: {ranges} do not have the {len(dims[name])} axes {dims[name]}")
            found = tuple(shape[axis] for shape in ranges)
            if isinstance(dim, int) and set(found) != {dim}:
                raise ConfigError(f"shapes of {name!r}: axis {axis} is {dim} in the model, not {found}")
            if isinstance(dim, str):
                _set_size(sizes, dim, found)
        if any(not isinstance(dim, int) for dim in dims[name]):
            profiles[name] = ranges
    missing = {name: axes for name, axes in dims.items() if name not in profiles and not all(map(_static, axes))}
    for name, axes in list(missing.items()):
        if all(_static(dim) or dim in sizes for dim in axes):
            low, best, high = (
                tuple(dim if isinstance(dim, int) else sizes[str(dim)][which] for dim in axes) for which in range(3)
            )
            profiles[name] = (low, best, high)
            del missing[name]
    if missing:
        name, axes = next(iter(missing.items()))
        example = tuple(dim if isinstance(dim, int) else 1 for dim in axes)
        raise ConfigError(
            f"TensorRT needs a range for each dynamic input; none was given for "
            f"{', '.join(f'{key} {list(value)}' for key, value in missing.items())}. For example "
            f"shapes={{{name!r}: ({example}, {example}, {example})}}: smallest, best, largest; on the command line "
            "--size batch=1,8,32"
        )
    return profiles


def _dims(value: onnx_ir.Value) -> list[int | str | None]:
    if value.shape is None:
        raise ConfigError(f"input {value.name!r} has no shape, not even a dynamic one: export with one")
    return [dim if isinstance(dim, int) else (dim.value or None) for dim in value.shape]


def _set_size(sizes: dict[str, tuple[int, ...]], dim: str, found: tuple[int, ...]) -> None:
    if len(found) != 3:
        raise ConfigError(f"shapes: {dim!r} is one dimension: give its smallest, best and largest size, not {found}")
    if sizes.setdefault(dim, found) != found:
        raise ConfigError(f"shapes: {dim!r} is {sizes[dim]} in one place and {found} in another")


def _static(dim: object) -> bool:
    return isinstance(dim, int)


def _three(name: str, given: Sequence[Sequence[int] | int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shapes = [(one,) if isinstance(one, int) else tuple(int(size) for size in one) for one in given]
    if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
        raise ConfigError(f"shapes of {name!r}: three shapes are needed, smallest, best and largest; given: {given}")
    low, best, high = shapes
    if any(not 1 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise ConfigError(f"shapes of {name!r}: {low}, {best}, {high} are not smallest, best and largest")
    return low, best, high
