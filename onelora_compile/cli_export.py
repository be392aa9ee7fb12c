"""What `onelora export` adds to `export_onnx`: axes that are dynamic without being asked for."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ShapesCollection
from torch.utils import _pytree as pytree

from onelora_compile.adapter import unwrap
from onelora_compile.cli_target import Loaded
from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.sizes import DynamicAxis
from onelora_compile.text import shortened

if TYPE_CHECKING:
    from onelora_compile.exporters import ExportReport

BATCH = DynamicAxis(None, 0, "batch")


def renamed(option: str, given: Sequence[str]) -> dict[str, str] | None:
    """`name=another` for each value of an option; None without any.

    Raises:
        ConfigError: a value that is not of that form.
    """
    names = {}
    for one in given:
        name, equals, another = one.partition("=")
        if not (name and equals and another):
            raise ConfigError(f"{option} {one!r}: write the name that it has and the one it gets, x=pixels")
        names[name] = another
    return names or None


def export_dynamic(
    loaded: Loaded, axes: Sequence[DynamicAxis], export: Callable[..., ExportReport], path: Path
) -> ExportReport:
    """Export with dynamic axes, and say so if it is them that the model can't be captured with.

    Args:
        loaded: the model and its inputs.
        axes: which are dynamic; none of them exports the sizes of the inputs.
        export: `export_onnx` with everything else.
        path: the file to write.

    Raises:
        ConfigError: axes that the inputs do not have.
        ExportError: as `export_onnx`.
    """
    if not axes:
        return export(loaded.model, loaded.args, path, loaded.kwargs)
    args, kwargs, shapes = _dynamic(loaded, axes)
    try:
        return export(loaded.model, args, path, kwargs, dynamic_shapes=shapes)
    except ExportError as error:
        with tempfile.TemporaryDirectory() as folder:  # whose fault it is, only the same without them can tell
            export(loaded.model, loaded.args, Path(folder) / "static.onnx", loaded.kwargs)
        names = shortened(dict.fromkeys(repr(axis.name) for axis in axes))
        raise ExportError(
            f"{type(loaded.model).__name__} can be exported for the sizes of its example inputs, but not with dynamic "
            f"{names}: --static exports it so, --dynamic names other axes. The reason: {_reason(error)}"
        ) from error


def _dynamic(loaded: Loaded, axes: Sequence[DynamicAxis]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs with no dynamic axis of size 1, which torch.export takes for a constant, and their dynamic shapes.

    Copies: torch.export marks tensors as dynamic, and leaves the mark on them when it fails.
    """
    named = {id(tensor): found for tensor, found in _named(loaded, axes)}

    def enlarged(value: Any) -> Any:
        axes = named.get(id(value))
        if axes is None:
            return value
        copy = value.detach().clone()
        for axis in axes:
            copy = torch.cat([copy, copy], axis) if copy.shape[axis] == 1 else copy
        return copy

    tree = (loaded.args, loaded.kwargs)
    args, kwargs = pytree.tree_map(enlarged, tree)
    shapes = ShapesCollection()
    for before, after in zip(pytree.tree_leaves(tree), pytree.tree_leaves((args, kwargs)), strict=True):
        if id(before) in named:
            shapes[after] = named[id(before)]
    return args, kwargs, shapes.dynamic_shapes(unwrap(loaded.model), args, kwargs)


def _named(loaded: Loaded, axes: Sequence[DynamicAxis]) -> list[tuple[Tensor, dict[int, str]]]:
    """Each tensor among the inputs with the names of its dynamic axes."""
    inputs = _inputs(loaded)
    found: list[tuple[Tensor, dict[int, str]]] = [(tensor, {}) for _, tensor in inputs]
    sizes: dict[str, int] = {}
    for one in axes:
        fitting = [
            (tensor, names)
            for (name, _), (tensor, names) in zip(inputs, found, strict=True)
            if one.input in (None, name) and tensor.ndim > one.axis
        ]
        if not fitting and one is BATCH:  # nobody asked for it, and numbers have none
            continue
        if not fitting:
            listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs)
            of = f"{one.input!r} with an axis {one.axis}" if one.input else f"with an axis {one.axis}"
            raise ConfigError(f"--dynamic: {loaded.name!r} returns no input {of}; the inputs: {listed}")
        size = sizes.setdefault(one.name, fitting[0][0].shape[one.axis])
        if one.input and any(tensor.shape[one.axis] != size for tensor, _ in fitting):
            raise ConfigError(f"--dynamic: {one.name!r} is {size} in one input and another size in {one.input!r}")
        for tensor, names in fitting:
            if tensor.shape[one.axis] == size:  # without an input's name: those that are as the first
                names[one.axis] = one.name
    return found


def _inputs(loaded: Loaded) -> list[tuple[str, Tensor]]:
    """Every tensor that the model is called with, by the argument that holds it."""
    bound = inspect.signature(unwrap(loaded.model).forward).bind(*loaded.args, **loaded.kwargs).arguments
    return [
        (name, leaf) for name, value in bound.items() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)
    ]


def _reason(error: ExportError) -> str:
    """What torch.export found, without its advice on how to write dynamic shapes in Python."""
    lines = str(error).splitlines()
    points = [line.strip()[2:].partition(". If you")[0] for line in lines if line.strip().startswith("- ")]
    return " ".join(points or lines[:2])
