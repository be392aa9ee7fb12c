"""Whether an ONNX file computes what the model computes: ONNX Runtime against eager on given inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onelora_compile.errors import ExportError, require
from onelora_compile.exporters.freeze import evaluating

# Largest difference over the largest magnitude of an output that rounding in this dtype explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Parity:
    """How two computations of the same outputs differ.

    Attributes:
        absolute: the largest difference of any output entry.
        relative: the same over the largest magnitude in its output; the worst output counts.
        tolerance: what `relative` may be for the outputs' dtype.
        output: the name of the worst output.
    """

    absolute: float
    relative: float
    tolerance: float
    output: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


def check_onnx(path: Path, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Parity:
    """Run the file in ONNX Runtime on the CPU and the model in eager on the same inputs, and compare.

    Raises:
        ExportError: the runtime refuses the file or its inputs, or gives other outputs than the model.
        MissingExtraError: onnxruntime is not installed.
    """
    runtime = require("onnxruntime", "onnx", "verify an ONNX file")
    with evaluating(model):
        expected = _tensors(model(*args, **dict(kwargs or {})))
    inputs = [value for value in pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(value, Tensor)]
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        if len(names) != len(inputs):
            raise ExportError(f"the ONNX model takes {len(names)} inputs {names}; {len(inputs)} tensors were given")
        feed = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        actual = session.run(None, feed)
    except ExportError:
        raise
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        raise ExportError(
            f"ONNX Runtime can't run the model: {error}. Export with verify=False to keep the file for another runtime"
        ) from error
    output_names = [node.name for node in session.get_outputs()]
    return compare(expected, [torch.from_numpy(np.asarray(value)) for value in actual], output_names)


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor], names: Sequence[str]) -> Parity:
    """The parity of the worst output.

    Raises:
        ExportError: another number of outputs, or an output of another shape.
    """
    if len(expected) != len(actual):
        raise ExportError(f"the ONNX model has {len(actual)} outputs {list(names)}, the model {len(expected)}")
    worst: Parity | None = None
    for name, want, got in zip(names, expected, actual, strict=True):
        if want.shape != got.shape:
            raise ExportError(f"output {name!r} is {list(got.shape)}, the model's is {list(want.shape)}")
        parity = _compare_one(name, want.detach().cpu(), got)
        if worst is None or not parity.relative / parity.tolerance <= worst.relative / worst.tolerance:
            worst = parity
    if worst is None:
        raise ExportError("the model has no tensor among its outputs, so there is nothing to compare")
    return worst


def _compare_one(name: str, want: Tensor, got: Tensor) -> Parity:
    tolerance = TOLERANCE.get(want.dtype, 1e-9)  # integers and booleans: equal
    wide, found = want.to(torch.float64), got.to(torch.float64)
    same = (wide == found) | (wide.isnan() & found.isnan())  # also equal infinities
    difference = torch.where(same, 0.0, (wide - found).abs())
    absolute = float(difference.max()) if difference.numel() else 0.0
    finite = wide[wide.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return Parity(absolute, absolute / max(scale, 1e-12) if absolute else 0.0, tolerance, name)


def _tensors(outputs: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]
