"""Which axes of a model's inputs may have another size in each call, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.errors import ConfigError
from onelora_compile.exporters.calls.signature import Call
from onelora_compile.exporters.calls.structure import level_of, tensors_in
from onelora_compile.printable import shortened

Axes = dict[int, Any]  # by axis: a name, or what torch.export takes: a Dim, a hint, a number


class MayVary(str):
    """The name of an axis that varies only where the model lets it."""

    __slots__ = ()


def axes_of(dynamic_shapes: Any, model: nn.Module, call: Call) -> list[Axes]:
    """The dynamic axes of each tensor of a call, in order.

    Args:
        dynamic_shapes: as `export_onnx` takes it: as in `torch.export.export`, where a dimension may be a name, and
            what holds several tensors may have one `{axis: dimension}` for all. A key may be the name of an input of
            the file, too. A string names the first axis of all inputs, wherever the model lets it vary; beside other
            entries it stands under the key "*".
        model: is asked by a `torch.export.ShapesCollection` alone.
        call: the example call.

    Raises:
        ConfigError: an input or an axis that the call does not have.
    """
    found: dict[str, Axes] = {name: {} for name in call.tensors}
    asked: Any = dynamic_shapes
    if hasattr(asked, "dynamic_shapes"):
        asked = asked.dynamic_shapes(model, call.args, call.kwargs)
    if isinstance(asked, str):
        asked = {"*": asked}
    if isinstance(asked, (tuple, list)):
        if len(asked) != len(call.arguments):
            raise ConfigError(
                f"dynamic_shapes has {len(asked)} entries; the call has {len(call.arguments)} arguments: "
                f"{shortened(call.arguments)}"
            )
        asked = dict(zip(call.arguments, asked, strict=True))
    if asked is None:
        asked = {}
    if not isinstance(asked, Mapping):
        raise ConfigError(f"dynamic_shapes is {asked!r}: give a mapping by input, or a tuple in their order")
    for key, spec in asked.items():
        _place(found, str(key), spec, call)
    return list(found.values())


def _place(found: dict[str, Axes], key: str, spec: Any, call: Call) -> None:
    if key == "*":
        first = next((tensor.shape[0] for tensor in call.tensors.values() if tensor.dim()), None)
        for name, tensor in call.tensors.items():
            if tensor.dim() and tensor.shape[0] == first:
                found[name].setdefault(0, MayVary(spec))
    elif key in call.arguments:
        names = iter(_names_of(call, key))
        for axes in _resolved(spec, call.arguments[key], key):
            found[next(names)].update(axes)
    elif below := [name for name in found if name == key or name.startswith(f"{key}.")]:
        for name in below:
            found[name].update(_axes(spec, call.tensors[name], name, strict=name == key))
    elif isinstance(spec, Mapping) and any(one in call.arguments for one in spec):  # **kwargs by its own name
        for one, inner in spec.items():
            _place(found, str(one), inner, call)
    elif spec:
        raise ConfigError(f"dynamic_shapes names {key!r}; the inputs are {shortened(found)}")


def _names_of(call: Call, argument: str) -> list[str]:
    """Names of the tensors in an argument: they stand together, in the order of the arguments."""
    start = 0
    for name, value in call.arguments.items():
        count = len(tensors_in(value))
        if name == argument:
            return list(call.tensors)[start : start + count]
        start += count
    return []


def _resolved(spec: Any, value: Any, name: str) -> list[Axes]:
    """The axes of each tensor in a value."""
    if isinstance(value, Tensor):
        return [_axes(spec, value, name, strict=True)]
    inside = [tensor for _, tensor in tensors_in(value)]
    if not spec:
        return [{} for _ in inside]
    if _is_axes(spec):  # one for all tensors
        return [_axes(spec, tensor, name, strict=False) for tensor in inside]
    level = level_of(value)
    names, parts = (level.names, level.parts) if level is not None else ([], [])
    if isinstance(spec, Mapping):
        if unknown := sorted({str(key) for key in spec} - set(names)):
            raise ConfigError(f"dynamic_shapes of {name!r} names {shortened(unknown)}; it has {shortened(names)}")
        given: Sequence[Any] = [{str(key): one for key, one in spec.items()}.get(part) for part in names]
    elif len(spec) == len(parts):
        given = spec
    elif len(spec) == len(inside):
        return [_axes(one, tensor, name, strict=True) for one, tensor in zip(spec, inside, strict=True)]
    else:
        raise ConfigError(f"dynamic_shapes of {name!r} has {len(spec)} entries for {len(parts)} parts")
    return [axes for one, part in zip(given, parts, strict=True) for axes in _resolved(one, part, name)]


def _is_dim(value: Any) -> bool:
    return value is None or isinstance(value, (str, int)) or not isinstance(value, (Mapping, Sequence))


def _is_axes(spec: Any) -> bool:
    """Whether this is `{axis: dimension}`, or a dimension for each axis."""
    if isinstance(spec, Mapping):
        return all(isinstance(key, int) and _is_dim(one) for key, one in spec.items())
    return isinstance(spec, (tuple, list)) and all(map(_is_dim, spec)) and any(one is not None for one in spec)


def _axes(spec: Any, tensor: Tensor, name: str, *, strict: bool) -> Axes:
    if not spec:
        return {}
    if not _is_axes(spec):
        if isinstance(spec, (tuple, list)) and all(one is None for one in spec):
            return {}
        raise ConfigError(f"dynamic_shapes of {name!r} is {spec!r}, not {{axis: dimension}}")
    axes = dict(spec) if isinstance(spec, Mapping) else dict(enumerate(spec))
    found = {axis + tensor.dim() if axis < 0 else axis: dim for axis, dim in axes.items() if dim is not None}
    if outside := [axis for axis in found if not 0 <= axis < tensor.dim()]:
        if strict:
            raise ConfigError(f"dynamic_shapes of {name!r} names axis {outside[0]}; it has {tensor.dim()} axes")
        found = {axis: dim for axis, dim in found.items() if axis not in outside}
    return found


def for_export(axes: Sequence[Axes]) -> Any:
    """As `torch.export.export` takes them: names are dynamic dimensions, of which it finds out which are equal."""
    if not any(axes):
        return None
    dim = torch.export.Dim

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return dim.AUTO if isinstance(value, MayVary) else dim.DYNAMIC
        return value

    return tuple({axis: one(value) for axis, value in each.items()} for each in axes)
