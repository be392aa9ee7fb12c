"""Ranges of the dynamic inputs of a bundle's model: one optimization profile, in which names have one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onelora_compile.errors import ConfigError
from onelora_compile.exporters.tensorrt import profiles
from onelora_compile.exporters.tensorrt.profiles import Dims, Profile

if TYPE_CHECKING:
    import onnx_ir

Shapes = Mapping[str, Sequence[Sequence[int] | int]]


def profile_of(model: onnx_ir.Model, shapes: Shapes | None) -> Profile:
    """The range of every dynamic input: (smallest, usual, largest) shape.

    Args:
        model: the model.
        shapes: as in `profiles_of` of the room `tensorrt`, for one profile.

    Raises:
        ConfigError: an unknown input, shapes that do not fit it or each other, or a dynamic input without a range.
    """
    dims = {str(value.name): _dims(value) for value in model.graph.inputs}
    profile = {name: one for found in profiles.profiles_of(dims, shapes) for name, one in found.items()}
    sizes = {name: profiles.sizes_of(name, given) for name, given in (shapes or {}).items() if name not in dims}
    for name, (low, usual, high) in profile.items():
        if not all(low):
            raise ConfigError(f"shapes of {name!r}: {low} is empty, and the self-test has to run it")
        for dim, found in zip(dims[name], zip(low, usual, high, strict=True), strict=True):
            if isinstance(dim, str) and dim != "?" and sizes.setdefault(dim, found) != found:
                raise ConfigError(f"shapes: {dim!r} is {sizes[dim]} in one place and {found} in another")
    return profile


def _dims(value: onnx_ir.Value) -> Dims:
    if value.shape is None:
        raise ConfigError(f"input {value.name!r} has no shape, not even a dynamic one: export with one")
    return tuple(dim if isinstance(dim, int) else (dim.value or "?") for dim in value.shape)
