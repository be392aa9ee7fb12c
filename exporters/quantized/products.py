"""The products with quantised weights in an ONNX model, and the matrix that each computes with.

    MatMul, Gemm, Conv, Einsum, …     of a constant that was dequantised and moved on its way
    MatMulNBits                       (q - zero_point) * scale for blocks of the input axis; numbers packed into bytes
    MatMulInteger, QLinearConv, …     (q - zero_point) * scale, with the scale where it is multiplied later

A product's matrix is [out_features, in_features] as the op means it, on whichever side it stands, transposed or not.
Source: the operators' texts in onnx/defs (opset 23) and in ONNX Runtime's docs/ContribOperators.md (1.32).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.exporters.onnx_file.constants import DOMAINS, Constants, attribute
from onelora_compile.exporters.quantized.later_scales import later_scales

if TYPE_CHECKING:
    import onnx_ir

# Positions of (numbers, scale, zero point) of the two factors; the scale is None where it is multiplied later.
INTEGER = {
    "MatMulInteger": ((0, None, 2), (1, None, 3)),
    "ConvInteger": ((0, None, 2), (1, None, 3)),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "DynamicQuantizeMatMul": ((0, None, None), (1, 2, 3)),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5)),
    "QLinearConv": ((0, 1, 2), (3, 4, 5)),
    "QGemm": ((0, 1, 2), (3, 4, 5)),
    "QAttention": ((0, 3, 6), (1, 4, 7)),
}
# What multiplies floating matrices: positions that a weight can have.
FLOATING = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedMatMul": (0, 1),
    "FusedGemm": (0, 1),
    "Einsum": (0, 1),
    "Conv": (1,),
    "FusedConv": (1,),
    "Attention": (1,),
    "GemmFastGelu": (1,),
}
CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "QLinearConv"}
_MULTIPLY = ("MatMul", "Gemm", "MoE", "Attention")  # in the names of what multiplies


def factors_of(node: onnx_ir.Node) -> tuple[int, ...]:
    """The inputs that an op multiplies as floating matrices; none of one that only has the name of such an op."""
    return FLOATING.get(node.op_type, ()) if node.domain in DOMAINS else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """One op that multiplies by a quantised weight.

    Attributes:
        op: the op.
        side: 0 where the weight stands on the left of the product, else 1.
        position: the input of the op that is the weight.
        window: the shape of the weight as the op reads it.
        stored: the value that holds the quantised numbers.
        shape: (out_features, in_features).
        dtype: of storage: "int8", "int4", "float8e5m2", …
        matrix: computes the matrix, float32 [out_features, in_features].
        multiples: where that is the base's times the scale of the input, which numbers of the file that scale may be.
    """

    op: onnx_ir.Node
    side: int
    position: int
    window: tuple[int, ...]
    stored: onnx_ir.Value
    shape: tuple[int, int]
    dtype: str
    matrix: Callable[[], np.ndarray]
    multiples: tuple[float, ...] = ()


def products_of(model: onnx_ir.Model, constants: Constants) -> Iterator[Product]:
    """The products with quantised weights, in the order of the model's graphs."""
    for node in model.graph.all_nodes():
        if node.domain not in DOMAINS:
            continue
        if node.op_type in FLOATING:
            yield from _of_floating(node, constants)
        elif node.op_type in INTEGER:
            yield from _of_integers(node, constants)
        elif node.op_type == "MatMulNBits":
            yield from _of_blocks(node, constants)


def unread_ops(model: onnx_ir.Model) -> list[str]:
    """The op types that hold integers in a packing that is not read, as MatMulBnb4 and QMoE do."""
    kinds = {
        node.op_type
        for node in model.graph.all_nodes()
        if any(word in node.op_type for word in _MULTIPLY)
        if node.op_type not in {*INTEGER, *FLOATING, "MatMulNBits"}
        for one in node.inputs
        if one is not None and one.const_value is not None
        if one.const_value.dtype.is_integer() and one.const_value.dtype.itemsize <= 1 and one.const_value.size > 1
    }
    return sorted(kinds)


def _given(node: onnx_ir.Node, index: int | None) -> onnx_ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _of_floating(node: onnx_ir.Node, constants: Constants) -> Iterator[Product]:
    for position in FLOATING[node.op_type]:
        value = _given(node, position)
        if value is None or not constants.known(value) or constants.known(_given(node, 1 - position)):
            continue
        leaves, quantized = constants.leaves(value)
        if quantized is None:
            continue
        stored = max(leaves, key=lambda leaf: leaf.const_value.size)  # type: ignore[union-attr]
        window = constants.shape(value)
        order = _order(node, position, window)
        if order is not None:
            shape, oriented = order
            matrix = functools.partial(_arriving, constants, value, oriented)
            yield Product(node, position, position, window, stored, shape, _name(quantized), matrix)


def _arriving(constants: Constants, value: onnx_ir.Value, oriented: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return oriented(constants.numbers(value).astype(np.float32))


_Oriented = tuple[tuple[int, int], Callable[[np.ndarray], np.ndarray]]


def _order(node: onnx_ir.Node, position: int, shape: tuple[int, ...]) -> _Oriented | None:
    """The shape [out_features, in_features] of the weight of an op, and how its numbers are brought into that order."""
    if node.op_type in CONVOLUTIONS:
        rows, columns = shape[0], int(np.prod(shape[1:]))
        return ((rows, columns), lambda w: w.reshape(rows, columns)) if attribute(node, "group", 1) == 1 else None
    if len(shape) < 2 or any(size != 1 for size in shape[:-2]) or 0 in shape:
        return None
    axis = output_axis(node, position)
    if axis is None or (node.op_type == "Einsum" and len(shape) != 2):
        return None
    flip = axis == 1
    rows, columns = shape[:-3:-1] if flip else shape[-2:]
    return (rows, columns), lambda w: w.reshape(w.shape[-2:]).T if flip else w.reshape(w.shape[-2:])


def output_axis(node: onnx_ir.Node, position: int) -> int | None:
    """Which axis of the two of a weight an op keeps: 0 of [out_features, in_features]; None where it is not told."""
    if node.op_type in CONVOLUTIONS:
        return 0
    if node.op_type == "Einsum":
        letters = einsum_letters(node, position)
        return None if letters is None else letters[0]
    turned = attribute(node, "transA" if position == 0 else "transB", 0)
    return int((position == 1) != bool(turned))


def einsum_letters(node: onnx_ir.Node, position: int) -> tuple[int, str, str, str, str] | None:
    """Of an Einsum with a weight of two axes: its output axis (0 or 1), its letters (out, in), the input, the output.

    None where the weight is not contracted on one axis and kept on the other.
    """
    equation = node.attributes["equation"].as_string().replace(" ", "")
    terms, arrow, out = equation.partition("->")
    parts = terms.split(",")
    if not arrow or len(parts) != 2 or len(parts[position]) != 2 or "." in parts[position]:
        return None
    weight, x = parts[position], parts[1 - position]
    for axis in (0, 1):
        rows, columns = weight[axis], weight[1 - axis]
        if rows in out and rows not in x and columns in x and columns not in out and rows != columns:
            return axis, rows, columns, x, out
    return None


def _of_integers(node: onnx_ir.Node, constants: Constants) -> Iterator[Product]:
    sides = INTEGER[node.op_type]
    both = node.op_type in ("MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm")
    for position in (0, 1) if both else (1,):
        q, scale, zero = (_given(node, index) for index in sides[position])
        if q is None or not constants.known(q) or constants.known(_given(node, sides[1 - position][0])):
            continue
        if any(one is not None and not constants.known(one) for one in (scale, zero)):
            continue
        window = constants.shape(q)
        order = _order(node, position, window)
        if order is None:
            continue
        shape, oriented = order
        where = sides[position][0]
        later = later_scales(node, constants) if scale is None else None
        factors = later.factors if later else []

        def matrix(
            position: int = position,
            q: onnx_ir.Value = q,
            oriented: Callable = oriented,
            factors: list[np.ndarray] = factors,
        ) -> np.ndarray:
            scale, zero = (_given(node, index) for index in sides[position][1:])
            numbers = oriented(constants.numbers(q).astype(np.float32))
            if zero is not None:
                numbers = numbers - _by_rows(constants.numbers(zero))
            for factor in [constants.numbers(scale)] if scale is not None else factors:
                numbers = numbers * _by_rows(factor)
            return numbers

        leaves, _ = constants.leaves(q)
        stored = max(leaves, key=lambda leaf: leaf.const_value.size)  # type: ignore[union-attr]
        assert stored.const_value is not None
        multiples = later.multiples if later else ()
        yield Product(node, position, where, window, stored, shape, _name(stored.const_value.dtype), matrix, multiples)


def _by_rows(numbers: np.ndarray) -> np.ndarray:
    """Scales or zero points for a weight [out_features, in_features]: one for all, or one for each row."""
    numbers = numbers.astype(np.float32)
    return numbers.reshape(()) if numbers.size == 1 else numbers.reshape(-1, 1)


def _of_blocks(node: onnx_ir.Node, constants: Constants) -> Iterator[Product]:
    packed = _given(node, 1)
    given = [_given(node, index) for index in (1, 2, 3, 4)]
    bits = attribute(node, "bits", 4)
    if packed is None or packed.const_value is None or given[1] is None or 8 % bits:
        return
    if any(one is not None and not constants.known(one) for one in given):
        return
    shape = attribute(node, "N", 0), attribute(node, "K", 0)
    yield Product(node, 1, 1, shape, packed, shape, f"int{bits}", lambda: _blocks(node, constants))


def _blocks(node: onnx_ir.Node, constants: Constants) -> np.ndarray:
    """[out_features, in_features] of MatMulNBits."""
    columns, rows = attribute(node, "K", 0), attribute(node, "N", 0)
    bits, size = attribute(node, "bits", 4), attribute(node, "block_size", 32)
    values = [_given(node, index) for index in (1, 2, 3, 4)]
    packed, scale, zero, groups = (None if one is None else constants.numbers(one) for one in values)
    assert packed is not None
    assert scale is not None
    count = -(-columns // size)
    q = _unpacked(packed.reshape(rows, count, -1), bits)[:, :, :size].reshape(rows, -1)[:, :columns].astype(np.float32)
    if zero is None:
        zero = np.full((rows, count), 2.0 ** (bits - 1), dtype=np.float32)
    elif zero.dtype == np.uint8:
        zero = _unpacked(zero.reshape(rows, -1), bits)[:, :count].astype(np.float32)
    # Which block's scale a column has: its own block's, unless an order by activations says otherwise.
    block = np.arange(columns) // size if groups is None else groups.astype(np.int64)[:columns]
    return (q - zero.reshape(rows, count)[:, block]) * scale.astype(np.float32).reshape(rows, count)[:, block]


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Small numbers out of bytes, low bits first, along the last axis."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _name(dtype: onnx_ir.DataType) -> str:
    name = dtype.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
