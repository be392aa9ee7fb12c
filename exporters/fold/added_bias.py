"""Which constant is the bias of an op."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

# Whose third input is a bias: MatMulInteger's is a zero point.
_BIASED = ("Gemm", "Conv", "ConvTranspose", "FusedGemm", "FusedConv")


def bias_of(op: onnx_ir.Node) -> onnx_ir.Value | None:
    """The constant that an op adds to its product, itself or by the Add that follows."""
    if op.op_type in _BIASED:
        return op.inputs[2] if len(op.inputs) > 2 else None
    if op.op_type != "MatMul":
        return None
    users = [use.node for use in op.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    return next((one for one in users[0].inputs if one is not None and one.const_value is not None), None)
