"""The numbers behind quantised weights of ONNX models, by the definitions of their operators.

    DequantizeLinear        (q - zero_point) * scale, for a tensor, an axis, or blocks of an axis
    MatMulNBits             the same for blocks of the input axis; numbers packed into bytes, low bits first
    MatMulInteger, …        (q - zero_point) * scale with the scale where it is multiplied later

Source: the operators' texts in onnx/defs (opset 21) and in ONNX Runtime's docs/ContribOperators.md (1.32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

# op -> positions of the quantised weight, its scale and its zero point.
_INTEGER = {
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QLinearMatMul": (3, 4, 5),
    "QAttention": (1, 4, 7),
    "MatMulInteger": (1, None, 3),
}


def dequantized(node: onnx_ir.Node, value: onnx_ir.Value, look: bool = False) -> np.ndarray | None:
    """A quantised weight as float32 [rows, columns], as far as the node says; None if it does not dequantise it.

    With `look` only whether: an array without numbers.  The scale of MatMulInteger is not known to the node: its
    matrix is right up to a factor for each column.
    """
    position = next((index for index, held in enumerate(node.inputs) if held is value), None)
    if node.op_type == "DequantizeLinear" and position is not None:
        return _linear(node, position, look)
    if node.op_type == "MatMulNBits" and position == 1:
        return np.empty((0, 0)) if look else _blocks(node)
    places = _INTEGER.get(node.op_type)
    if places is None or position != places[0]:
        return None
    if look:
        return np.empty((0, 0))
    q = _numbers(node, position)
    scale = _numbers(node, places[1]) if places[1] is not None else _later_scale(node)
    zero = _numbers(node, places[2])
    if q is None or q.ndim != 2:
        return None
    numbers = q.astype(np.float32) - (0 if zero is None else zero.astype(np.float32))
    return numbers * (np.float32(1) if scale is None else scale.astype(np.float32))


def _linear(node: onnx_ir.Node, position: int, look: bool) -> np.ndarray | None:
    if position != 0:
        return None
    tensor = node.inputs[0].const_value if node.inputs[0] is not None else None
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype.bitwidth > 8:
        return None
    if look:
        return np.empty((0, 0))
    q, scale, zero = (_numbers(node, index) for index in range(3))
    if q is None or scale is None:
        return None
    axis, block = _attribute(node, "axis", 1) % 2, _attribute(node, "block_size", 0)
    scale = scale.astype(np.float32)
    zero = np.zeros_like(scale) if zero is None else zero.astype(np.float32)
    if block:
        scale, zero = (np.repeat(one, block, axis)[: q.shape[0], : q.shape[1]] for one in (scale, zero))
    elif scale.ndim == 1:
        scale, zero = (np.expand_dims(one, 1 - axis) for one in (scale, zero))
    return (q.astype(np.float32) - zero) * scale


def _blocks(node: onnx_ir.Node) -> np.ndarray | None:
    """[out_features, in_features] of MatMulNBits."""
    columns, rows = _attribute(node, "K", 0), _attribute(node, "N", 0)
    bits, size = _attribute(node, "bits", 4), _attribute(node, "block_size", 32)
    packed, scale, zero = (_numbers(node, index) for index in (1, 2, 3))
    if packed is None or scale is None or 8 % bits:
        return None
    count = -(-columns // size)
    q = _unpacked(packed.reshape(rows, count, -1), bits)[:, :, :size].astype(np.float32)
    if zero is None:
        zero = np.full((rows, count), 2.0 ** (bits - 1), dtype=np.float32)
    elif zero.dtype == np.uint8:
        zero = _unpacked(zero.reshape(rows, -1), bits)[:, :count].astype(np.float32)
    numbers = (q - zero.reshape(rows, count, 1)) * scale.astype(np.float32).reshape(rows, count, 1)
    return np.ascontiguousarray(numbers.reshape(rows, -1)[:, :columns])


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Small numbers out of bytes, low bits first, along the last axis."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _later_scale(node: onnx_ir.Node) -> np.ndarray | None:
    """The scale of the weight of a MatMulInteger: a constant factor of the product that its output is multiplied by."""
    casts = [use.node.outputs[0] for use in node.outputs[0].uses() if use.node.op_type == "Cast"]
    scaled = [use.node for product in casts for use in product.uses() if use.node.op_type == "Mul"]
    for factor in scaled[0].inputs if scaled else ():
        if factor is None or factor in casts:
            continue
        made = factor.producer()
        for part in (factor, *(made.inputs if made is not None and made.op_type == "Mul" else ())):
            if part is not None and part.const_value is not None:
                return np.asarray(part.const_value.numpy())
    return None


def _numbers(node: onnx_ir.Node, index: int | None) -> np.ndarray | None:
    if index is None or index >= len(node.inputs):
        return None
    value = node.inputs[index]
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())


def _attribute(node: onnx_ir.Node, name: str, default: int) -> int:
    found: Any = node.attributes.get(name)
    return int(found.as_int()) if found is not None else default
