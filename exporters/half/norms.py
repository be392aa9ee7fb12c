"""Norms that are written out in float16, whose squares overflow from 256 on.

    (x - mean) / sqrt(mean((x - mean)²) + e) * s + b          ->   LayerNormalization(x, s, b), float32 inside
    any other mean or sum of squares, up to what it divides   ->   the same nodes in float32, between casts

`Pow(x, 2)`, `Mul(x, x)`, and reductions that square themselves (ReduceL2, ReduceSumSquare) count as squares.  Leaves
alone: (1) squares in float32, (2) squares that are not reduced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.errors import require
from onelora_compile.exporters.half.retype import retype
from onelora_compile.exporters.onnx_file.constants import Constants
from onelora_compile.exporters.opsets.write_out import Before

if TYPE_CHECKING:
    import onnx_ir

_REDUCED = ("ReduceMean", "ReduceSum")
_SQUARING = ("ReduceL2", "ReduceSumSquare")
_ON_THE_WAY = ("Add", "Sqrt", "Reciprocal", "Pow", "Max", "Clip", "Mul", "Div", "Cast", "Expand")
_STEPS = 6


@dataclasses.dataclass(frozen=True)
class Squares:
    """A reduced square.

    Attributes:
        square: the node that squares.
        inside: all nodes that have to be in float32, the square and what it divides among them.
    """

    square: onnx_ir.Node
    inside: tuple[onnx_ir.Node, ...]


def half_norms(model: onnx_ir.Model, also_float32: bool = False) -> list[Squares]:
    """The reduced squares in float16; with `also_float32` those too that a weakly typed engine may halve."""
    constants, found = Constants(model), []
    for node in model.graph.all_nodes():
        dtype = node.outputs[0].dtype
        half = dtype is not None and (dtype.name == "FLOAT16" or (also_float32 and dtype.name == "FLOAT"))
        if half and is_square(node, constants) and (inside := _region(node)):
            found.append(Squares(node, inside))
    return found


def is_square(node: onnx_ir.Node, constants: Constants) -> bool:
    """Whether a node squares a computed value."""
    if node.op_type in ("Mul", *_SQUARING):
        return node.op_type != "Mul" or node.inputs[0] is node.inputs[1]
    if node.op_type != "Pow" or node.inputs[1] is None or not constants.known(node.inputs[1]):
        return False
    power = constants.numbers(node.inputs[1])
    return bool(power.size == 1 and float(power.reshape(())) == 2.0)


def _region(square: onnx_ir.Node) -> tuple[onnx_ir.Node, ...]:
    """From a square over its reduction to the quotient; empty if it is not reduced."""
    reduced = [use.node for use in square.outputs[0].uses() if use.node.op_type in _REDUCED]
    reduced = [square] if square.op_type in _SQUARING else reduced
    if not reduced:
        return ()
    inside = dict.fromkeys([square, *reduced])
    nodes, root = list(reduced), square.op_type == "ReduceL2"
    for _ in range(_STEPS):
        nodes = [use.node for one in nodes for use in one.outputs[0].uses() if use.node.op_type in _ON_THE_WAY]
        inside |= dict.fromkeys(nodes)
        root = root or any(one.op_type in ("Sqrt", "Pow") for one in nodes)
        if root and any(one.op_type in ("Mul", "Div") for one in nodes):  # the normal value: small again
            break
    source = square.inputs[0].producer() if square.inputs[0] is not None else None
    if source is not None and source.op_type == "Sub":  # from the mean: both sides are as large as x
        inside[source] = None
        inside |= {mean: None for one in source.inputs if (mean := _mean(one)) is not None}
    return tuple(inside)


def _mean(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "ReduceMean" else None


def widen_norms(model: onnx_ir.Model) -> int:
    """Compute the reduced squares of a model in float32, in place; returns how many there were."""
    ir = require("onnx_ir", "onnx", "change an ONNX model")
    found = half_norms(model)
    retype(model, {node: ir.DataType.FLOAT for one in found for node in one.inside})
    return len(found)


def fuse_layer_norms(model: onnx_ir.Model) -> int:
    """Put one operator in the place of written out LayerNorms over the last axis, in place; returns of how many.

    For opset 17 and newer.
    """
    constants, count = Constants(model), 0
    for node in list(model.graph.all_nodes()):
        if node.graph is not None and (norm := _layer_norm(node, constants)) is not None:
            norm.fuse(constants)
            count += 1
    return count


@dataclasses.dataclass
class _LayerNorm:
    """A written out LayerNorm.

    Attributes:
        x: its input.
        epsilon: added to the variance.
        last: the node whose output is the norm's so far.
        scale: None is ones; both are constants.
        bias: None is zeros.
    """

    x: onnx_ir.Value
    epsilon: float
    last: onnx_ir.Node
    scale: onnx_ir.Value | None = None
    bias: onnx_ir.Value | None = None

    def fuse(self, constants: Constants) -> None:
        """Replace the last node; the others have no reader then."""
        made = Before(self.last)
        width = self.x.shape[-1] if self.x.shape is not None else None
        scale = self.scale
        if scale is None:
            assert isinstance(width, int)
            assert self.x.dtype is not None
            scale = made.constant(np.ones(width, self.x.dtype.numpy()))
        rest = [] if self.bias is None else [self.bias]
        y = made.add("LayerNormalization", self.x, scale, *rest, axis=-1, epsilon=self.epsilon, stash_type=1)
        made.replace_with(y)


def _layer_norm(node: onnx_ir.Node, constants: Constants) -> _LayerNorm | None:
    """The norm whose quotient a node is."""
    deviation, root = _quotient(node)
    if deviation is None or root is None or root.op_type != "Sqrt":
        return None
    below = _producer(root.inputs[0], "Add")
    for variance, epsilon in _both(below):
        mean = _producer(variance, "ReduceMean")
        square = _producer(mean.inputs[0], "Pow", "Mul") if mean is not None and _over_last(mean, constants) else None
        if square is None or not is_square(square, constants) or square.inputs[0] is not deviation:
            continue
        x = _centred(deviation, constants)
        if x is not None and constants.known(epsilon) and constants.numbers(epsilon).size == 1:
            return _with_affine(_LayerNorm(x, float(constants.numbers(epsilon).reshape(())), node), constants)
    return None


def _quotient(node: onnx_ir.Node) -> tuple[onnx_ir.Value | None, onnx_ir.Node | None]:
    """What a node divides, and the node that makes what it divides by."""
    if node.op_type == "Div" and node.inputs[1] is not None:
        return node.inputs[0], node.inputs[1].producer()
    for value, other in _both(node if node.op_type == "Mul" else None):
        if (inverse := _producer(other, "Reciprocal")) is not None and inverse.inputs[0] is not None:
            return value, inverse.inputs[0].producer()
    return None, None


def _centred(deviation: onnx_ir.Value, constants: Constants) -> onnx_ir.Value | None:
    """X where a value is x minus its mean over the last axis."""
    minus = _producer(deviation, "Sub")
    mean = _producer(minus.inputs[1], "ReduceMean") if minus is not None else None
    if minus is None or mean is None or mean.inputs[0] is not minus.inputs[0] or not _over_last(mean, constants):
        return None
    return minus.inputs[0]


def _with_affine(norm: _LayerNorm, constants: Constants) -> _LayerNorm | None:
    """The norm with the constant scale and bias behind it; None where the operator would need a width nobody knows."""
    width = norm.x.shape[-1] if norm.x.shape is not None else None
    for op_type in ("Mul", "Add"):
        uses = list(norm.last.outputs[0].uses())
        after = uses[0].node if len(uses) == 1 and not norm.last.outputs[0].is_graph_output() else None
        for value, other in _both(after if after is not None and after.op_type == op_type else None):
            if value is norm.last.outputs[0] and constants.known(other):
                shape = constants.shape(other)
                if len(shape) == 1 and shape[0] > 1 and (width is None or width == shape[0]):
                    assert after is not None
                    norm.last = after
                    norm.scale, norm.bias = (other, None) if op_type == "Mul" else (norm.scale, other)
                    width = shape[0]
                    break
    return norm if norm.scale is not None or isinstance(width, int) else None


def _over_last(node: onnx_ir.Node, constants: Constants) -> bool:
    if "keepdims" in node.attributes and not node.attributes["keepdims"].as_int():
        return False
    axes: list[int] = []
    if "axes" in node.attributes:
        axes = [int(axis) for axis in node.attributes["axes"].as_ints()]
    elif len(node.inputs) > 1 and node.inputs[1] is not None and constants.known(node.inputs[1]):
        axes = [int(axis) for axis in constants.numbers(node.inputs[1]).ravel()]
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else None
    return len(axes) == 1 and axes[0] in (-1, rank - 1 if rank else -1)


def _producer(value: onnx_ir.Value | None, *op_types: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def _both(node: onnx_ir.Node | None) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Value]]:
    """The two inputs of a node, in both orders; nothing for None."""
    if node is not None and node.inputs[0] is not None and node.inputs[1] is not None:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]
