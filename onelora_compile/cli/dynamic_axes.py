"""What `onelora export` adds to `export_onnx` and `export_runtime`: axes that are dynamic without being asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.cli.sizes import DynamicAxis
from onelora_compile.cli.user_function import Loaded
from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters.calls.signature import Call
from onelora_compile.printable import shortened

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
        export: `export_onnx` or `export_runtime` with everything else.
        path: the file to write.

    Raises:
        ConfigError: axes that the inputs do not have.
        ExportError: as that.
    """
    if not axes:
        return export(loaded.model, loaded.args, path, loaded.kwargs)
    shapes = _dynamic(loaded, axes)
    try:
        return export(loaded.model, loaded.args, path, loaded.kwargs, dynamic_shapes=shapes)
    except ExportError as error:
        with tempfile.TemporaryDirectory() as folder:  # whose fault it is, only the same without them can tell
            export(loaded.model, loaded.args, Path(folder) / f"static{path.suffix}", loaded.kwargs)
        names = shortened(dict.fromkeys(repr(axis.name) for axis in axes))
        raise ExportError(
            f"{type(loaded.model).__name__} can be exported for the sizes of its example inputs, but not with dynamic "
            f"{names}: --static exports it so, --dynamic names other axes. The reason: {_reason(error)}"
        ) from error


def _dynamic(loaded: Loaded, axes: Sequence[DynamicAxis]) -> dict[str, dict[int, str]]:
    """The names of the dynamic axes of each tensor among the inputs, by its own name."""
    inputs = Call.of(unwrap(loaded.model), loaded.args, loaded.kwargs).tensors
    found: dict[str, dict[int, str]] = {name: {} for name in inputs}
    sizes: dict[str, int] = {}
    for one in axes:
        fitting = {name: x for name, x in inputs.items() if _is_of(name, one.input) and x.ndim > one.axis}
        if not fitting and one is BATCH:  # nobody asked for it, and numbers have none
            continue
        if not fitting:
            listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            of = f"{one.input!r} with an axis {one.axis}" if one.input else f"with an axis {one.axis}"
            raise ConfigError(f"--dynamic: {loaded.name!r} returns no input {of}; the inputs: {listed}")
        size = sizes.setdefault(one.name, next(iter(fitting.values())).shape[one.axis])
        alike = [name for name, tensor in fitting.items() if tensor.shape[one.axis] == size]
        if not alike or (one.input and len(alike) < len(fitting)):
            where = repr(one.input) if one.input else f"axis {one.axis} of every input"
            raise ConfigError(f"--dynamic: {one.name!r} is {size} in one place and another size in {where}")
        for name in alike:  # without an input's name: those that are as the first
            found[name][one.axis] = one.name
    return found


def _is_of(name: str, asked: str | None) -> bool:
    """Whether a tensor is an input that was asked for, or a part of it."""
    return asked is None or name == asked or name.startswith(f"{asked}.")


def _reason(error: ExportError) -> str:
    """What torch.export found, without its advice on how to write dynamic shapes in Python."""
    lines = str(error).splitlines()
    points = [line.strip()[2:].partition(". If you")[0] for line in lines if line.strip().startswith("- ")]
    return " ".join(points or lines[:2])
