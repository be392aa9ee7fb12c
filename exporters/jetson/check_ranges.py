"""Whether float16 holds a bundle's model on its reference inputs, and what its values are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.exporters.half.ranges import INPUT, LARGEST, STORED, TensorRange, measure
from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.jetson.fit_model import Fitted
from onelora_compile.weights.adapter_file import read_adapter

_PROBES = 128  # values that the device can look at
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Slice", "Split", "Expand", "Gather")


def check_ranges(
    fitted: Fitted, cases: Mapping[str, Mapping[str, np.ndarray]], files: Mapping[str, Path], weak: bool
) -> list[dict[str, Any]]:
    """Measure the values of the model with every adapter of the bundle.

    Args:
        fitted: the model.
        cases: its reference inputs.
        files: the adapters.
        weak: whether TensorRT may take float16 where the model has float32; then what float16 can't hold is a note.

    Returns:
        What the device knows of them: name, operator and largest magnitude, in the order of the graph.

    Raises:
        ExportError: a value that the model has in float16 overflows.
    """
    if not cases or not (weak or "float16" in fitted.dtypes):
        return []
    names = list(fitted.values) if fitted.traits.takes_files else []
    runs = (
        dict(inputs) | adapter
        for inputs in cases.values()
        for adapter in _adapters(fitted, files, len(next(iter(inputs.values()), np.zeros(1))))
    )
    found = measure(fitted.model, runs, names)
    if over := [one for one in found.values() if one.broken]:
        raise ExportError(_refusal(over))
    if weak and (wide := [one for one in found.values() if one.overflows]):
        fitted.notes.append(
            f"{wide[0].told}, beyond float16 ({len(wide)} values are): TensorRT may choose float16 for it all the "
            "same; export with dtype=torch.float16, keep_float32='auto' for a release that keeps the file's types"
        )
    return _probes(found)


def _adapters(fitted: Fitted, files: Mapping[str, Path], rows: int) -> Iterator[dict[str, np.ndarray]]:
    if fitted.traits.feeds_ids:
        for number in range(len(fitted.metadata.adapters) + 1):  # the last row is the base
            yield {IDS: np.full(rows, number, np.int64)}
        return
    yield dict(fitted.values) if fitted.traits.takes_files else {}
    for path in files.values():
        yield fitted.metadata.values_of(read_adapter(path))


def _refusal(over: Sequence[TensorRange]) -> str:
    computed = [one for one in over if one.op not in (STORED, INPUT)] or list(over)
    return (
        f"the model has {len(over)} values in float16 that float16 can't hold on the reference inputs; the first is "
        f"{computed[0].told}, of {LARGEST:.0f}. An engine gives NaN, infinity or one class everywhere. Export again "
        "with export_onnx(..., dtype=torch.float16, keep_float32='auto', calibration=real inputs); `onelora ranges` "
        "shows all of them. If the reference inputs are not of the kind that the model is made for, give inputs="
    )


def _probes(found: Mapping[str, TensorRange]) -> list[dict[str, Any]]:
    """Computed values that the device can look at: those nearest to overflow, and others between them."""
    computed = [one for one in found.values() if one.op not in (STORED, INPUT, *_MOVES)]
    nearest = sorted(computed, key=lambda one: one.headroom)[: _PROBES // 2]
    step = -(-len(computed) // (_PROBES // 2)) or 1
    chosen = {one.name for one in [*nearest, *computed[::step]]}
    return [
        {"name": one.name, "op": one.op, "dtype": one.dtype, "largest": one.largest, "finite": one.finite}
        for one in computed
        if one.name in chosen
    ]
