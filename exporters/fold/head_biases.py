"""What the ops around a trained head's weight do to its bias: along which axis it lies, and what multiplies it.

MatMul(x, W), Gemm, Conv    b [out_features], along the op's own axis
MatMul(W, x [.., in, n])    b [out_features, 1]
MatMul(W, x [in])           b [out_features]
Mul(x, w)                   b as w lies: [channels, 1, 1] of channels first
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir

    from onelora_compile.exporters.fold.parameter_reads import ParameterRead


def scale_of(op: onnx_ir.Node) -> str | None:
    """The factors of a Gemm that multiplies its product and its bias by different ones, as text."""
    if op.op_type != "Gemm":
        return None
    alpha, beta = (op.attributes[name].as_float() if name in op.attributes else 1.0 for name in ("alpha", "beta"))
    if len(op.inputs) < 3 or op.inputs[2] is None:
        return f"alpha={alpha:g}" if alpha != 1 else None
    return f"alpha={alpha} and beta={beta}" if alpha != beta else None


def bias_shape(model: onnx_ir.Model, read: ParameterRead) -> tuple[int, ...] | None:
    """The shape of a bias that is added to what the reader of a weight gives; None where its axis can't be told.

    Args:
        model: gets the shapes that its ops tell, where they decide.
        read: of the weight.
    """
    op, at, held = read.use.op, read.use.position, read.value.const_value
    assert held is not None
    if op.op_type == "Mul":
        known = op.inputs[at].shape if len(read.use.nodes) > 1 else held.shape  # type: ignore[union-attr]
        return None if known is None or not all(isinstance(size, int) for size in known) else tuple(known.numpy())
    if op.op_type != "MatMul" or at == 1:
        return (-1,)
    rank = _rank(model, op.inputs[1])
    return None if rank is None else (-1,) if rank == 1 else (-1, 1)


def _rank(model: onnx_ir.Model, value: onnx_ir.Value | None) -> int | None:
    if value is None:
        return None
    if value.shape is None:
        passes: Any = require("onnx_ir.passes.common", "onnx", "fold into an ONNX model")
        passes.ShapeInferencePass()(model)
    return None if value.shape is None else len(value.shape)
