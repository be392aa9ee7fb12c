"""The whole scale of an attention on its query.

    MatMul(q * a, k * b) … Softmax   ->   MatMul(q * (a b), k) … Softmax

The same function, with one rounding less for each entry of k.  Transposes and reshapes between a scale and the product
stay.  Leaves alone: (1) a product that no Softmax follows, (2) one side without a scale, (3) a scale that is no single
number, (4) quantisers in between, whose ranges belong to the scaled key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.exporters.onnx_file.constants import Constants
from onelora_compile.exporters.opsets.write_out import Before

if TYPE_CHECKING:
    import onnx_ir

_PRODUCTS = ("MatMul", "Einsum")
_MOVES = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Expand")
# What may stand between the scores and their Softmax: masks, a soft cap, casts.
_TO_SOFTMAX = (*_MOVES, "Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Tanh", "Max", "Min", "Concat")
_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Scaled:
    """One side of a product.

    Attributes:
        source: what is scaled.
        factor: by what, a single number.
        divides: whether it is divided by it.
        moves: the nodes between the scale and the product, in order.
    """

    source: onnx_ir.Value
    factor: onnx_ir.Value
    divides: bool
    moves: tuple[onnx_ir.Node, ...]


def split_scales(model: onnx_ir.Model) -> list[tuple[onnx_ir.Node, Scaled, Scaled]]:
    """The products of scores whose both sides are scaled, with these sides; what is quantised is not among them."""
    constants = Constants(model)
    found = []
    for node in model.graph.all_nodes():
        if node.op_type in _PRODUCTS and len(node.inputs) == 2 and _reaches_softmax(node):
            q, k = (_scaled(one, constants) for one in node.inputs)
            if q is not None and k is not None:
                found.append((node, q, k))
    return found


def join_scales(model: onnx_ir.Model) -> int:
    """Put the whole scale on the query of every attention, in place; returns of how many."""
    sites, constants = split_scales(model), Constants(model)
    for node, q, k in sites:
        made = Before(node)
        whole = _whole(made, node, q, k, constants)
        scaled = made.add("Mul", q.source, whole)
        scaled.dtype, scaled.shape = q.source.dtype, q.source.shape
        node.replace_input_with(0, _moved(made, scaled, q.moves))
        node.replace_input_with(1, _moved(made, k.source, k.moves))
    return len(sites)


def has_attention(model: onnx_ir.Model) -> bool:
    """Whether a product of two computed values goes to a Softmax."""
    constants = Constants(model)
    return any(
        node.op_type in _PRODUCTS and not any(constants.known(one) for one in node.inputs) and _reaches_softmax(node)
        for node in model.graph.all_nodes()
    )


def _reaches_softmax(node: onnx_ir.Node) -> bool:
    nodes = [node]
    for _ in range(_DEPTH):
        nodes = [use.node for one in nodes for value in one.outputs for use in value.uses()]
        if any(one.op_type == "Softmax" for one in nodes):
            return True
        nodes = [one for one in dict.fromkeys(nodes) if one.op_type in _TO_SOFTMAX]
    return False


def _scaled(value: onnx_ir.Value | None, constants: Constants) -> Scaled | None:
    moves: list[onnx_ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _MOVES:
        moves.insert(0, node)
        value = node.inputs[0]
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    for source, factor in _sides(node):
        if _is_number(factor, constants) and not _is_number(source, constants) and _keeps_rank(source, factor):
            return Scaled(source, factor, node.op_type == "Div", tuple(moves))
    return None


def _sides(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Value]]:
    first, second = node.inputs
    assert first is not None
    assert second is not None
    yield first, second
    if node.op_type == "Mul":
        yield second, first


def _is_number(value: onnx_ir.Value, constants: Constants) -> bool:
    if constants.known(value):
        return math.prod(constants.shape(value)) == 1
    return value.shape is not None and all(size == 1 for size in value.shape)


def _keeps_rank(source: onnx_ir.Value, factor: onnx_ir.Value) -> bool:
    rank = len(factor.shape) if factor.shape is not None else 0
    return rank <= 1 or (source.shape is not None and rank <= len(source.shape))


def _whole(made: Before, node: onnx_ir.Node, q: Scaled, k: Scaled, constants: Constants) -> onnx_ir.Value:
    if not all(constants.known(one.factor) for one in (q, k)):
        left, right = (made.add("Reciprocal", one.factor) if one.divides else one.factor for one in (q, k))
        value: onnx_ir.Value = made.add("Mul", left, right)
        return value
    left, right = (constants.numbers(one.factor).reshape(()) for one in (q, k))
    whole = math.prod(float(one) ** (-1 if side.divides else 1) for one, side in ((left, q), (right, k)))
    constant: onnx_ir.Value = made.constant(np.array(_meant(whole, node, left.dtype), left.dtype))
    return constant


def _meant(whole: float, node: onnx_ir.Node, dtype: np.dtype) -> float:
    """1 / sqrt(d) where the product is that up to the rounding of its two parts, which it then does not keep."""
    width = node.inputs[0].shape[-1] if node.inputs[0] is not None and node.inputs[0].shape else None
    if node.op_type == "MatMul" and isinstance(width, int) and width > 0:
        usual = 1 / math.sqrt(width)
        if abs(whole - usual) <= 2 * float(np.finfo(dtype).eps) * usual:
            return usual
    return whole


def _moved(made: Before, value: onnx_ir.Value, moves: tuple[onnx_ir.Node, ...]) -> onnx_ir.Value:
    """The value behind copies of the nodes: the old ones may have other readers."""
    for node in moves:
        attributes = {name: one.value for name, one in node.attributes.items()}
        moved = made.add(node.op_type, value, *node.inputs[1:], **attributes)
        moved.dtype, moved.shape = value.dtype, node.outputs[0].shape
        value = moved
    return value
