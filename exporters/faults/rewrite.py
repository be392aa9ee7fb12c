"""Rewrite the graphs that a release of TensorRT is known to compute wrong, and say which of them a model has."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onelora_compile.errors import require
from onelora_compile.exporters.faults.split_scale import has_attention, join_scales, split_scales
from onelora_compile.exporters.half.norms import fuse_layer_norms, half_norms, widen_norms
from onelora_compile.exporters.jetson.device.core.faults import (
    HALF_ATTENTION,
    HALF_NORM,
    LAYER_NORM,
    SPLIT_SCALE,
    Fault,
    known,
)
from onelora_compile.exporters.opsets.write_out import write_out_norms

if TYPE_CHECKING:
    import onnx_ir

_LAYER_NORM_SINCE = 17


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What was done to a model for a release.

    Attributes:
        notes: one line for each known fault that the model met, with what was done and where it was reported.
        graphs: what the model still has of the graphs in the table, for other releases too.
    """

    notes: list[str]
    graphs: list[str]

    @property
    def changed(self) -> bool:
        """Whether the model is another one than before."""
        return bool(self.notes)


def rewrite_for(model: onnx_ir.Model, version: str, half: bool, weak: bool = False) -> Rewritten:
    """Rewrite a model, in place, so that a release of TensorRT computes it right.

    What it computes is the same: the whole attention scale has one rounding less, norms are computed in float32.

    Args:
        model: an ONNX model without functions.
        version: of TensorRT.
        half: whether the engine computes in 16 bit anywhere.
        weak: whether TensorRT may take float16 where the model has float32.
    """
    passes = require("onnx_ir.passes.common", "onnx", "change an ONNX model")
    passes.ShapeInferencePass()(model)
    notes = []
    for fault in known(version, half=half):
        if text := _rewritten(model, fault, weak):
            notes.append(f"{text}: TensorRT {version} has a known fault with {fault}")
    if notes:
        passes.RemoveUnusedNodesPass()(model)
    return Rewritten(notes, graphs_of(model, weak))


def graphs_of(model: onnx_ir.Model, weak: bool = False) -> list[str]:
    """Which of the graphs in the table a model has."""
    found = {
        SPLIT_SCALE: bool(split_scales(model)),
        HALF_NORM: bool(half_norms(model, weak)),
        LAYER_NORM: any(node.op_type == "LayerNormalization" for node in model.graph.all_nodes()),
        HALF_ATTENTION: has_attention(model),
    }
    return [name for name, there in found.items() if there]


def _rewritten(model: onnx_ir.Model, fault: Fault, weak: bool) -> str:
    """What was done about a fault; "" if the model does not meet it, or nothing can be done."""
    if fault.graph == SPLIT_SCALE and (count := join_scales(model)):
        return f"the whole scale of {count} attentions was put on q"
    if fault.graph == HALF_NORM:
        return _norms(model, weak)
    if fault.graph == LAYER_NORM and (count := write_out_norms(model)):
        return f"{count} LayerNormalization written out"
    return ""


def _norms(model: onnx_ir.Model, weak: bool) -> str:
    """A LayerNorm as one operator where the opset has it; other norms of float16 in float32."""
    if not half_norms(model, weak):
        return ""
    opset = model.opset_imports.get("") or 1
    fused = fuse_layer_norms(model) if opset >= _LAYER_NORM_SINCE else 0
    if fused:
        require("onnx_ir.passes.common", "onnx", "change an ONNX model").RemoveUnusedNodesPass()(model)
    widened = widen_norms(model)
    parts = [f"{fused} LayerNorms became one operator"] if fused else []
    parts += [f"{widened} norms are computed in float32"] if widened else []
    return ", ".join(parts)
