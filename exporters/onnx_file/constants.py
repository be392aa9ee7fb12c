"""The constant values of an ONNX model: initializers, Constant nodes, and what ops compute from those alone.

A quantised weight is rarely where the matmul reads it: tools dequantise, cast, scale, transpose, split and reshape it
on the way.  What counts is the matrix that arrives, and that is computed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir

# What may lie between stored numbers and the op that reads them; no op of unknown or random effect.
_ARITHMETIC = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Cast",
    "CastLike",
    "QuantizeLinear",
    "DequantizeLinear",
    "Pow",
    "Sqrt",
}
_MOVES = {
    "Identity",
    "Transpose",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Gather",
    "GatherND",
    "Flatten",
    "Expand",
}
_SHAPES = {"Shape", "ConstantOfShape", "Range", "Tile"}
_KNOWN = _ARITHMETIC | _MOVES | _SHAPES
DOMAINS = ("", "ai.onnx", "com.microsoft")  # whose operators are known; the last has a DequantizeLinear of its own
_DEPTH = 32


class Constants:
    """Tells which values of a model are constant, and computes them; nothing is kept but the answer whether."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self._ir: Any = require("onnx_ir", "onnx", "read an ONNX model")
        self._onnx: Any = require("onnx", "onnx", "read an ONNX model")
        self._opset = model.opset_imports.get("") or 18
        self._known: dict[onnx_ir.Value, bool] = {}

    def known(self, value: onnx_ir.Value | None, depth: int = 0) -> bool:
        """Whether a value is constant."""
        if value is None or depth > _DEPTH:
            return False
        if value not in self._known:
            self._known[value] = self._stored(value) is not None or self._computed(value, depth)
        return self._known[value]

    def readers(self, value: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, int]]:
        """What reads a constant value, or what constants are made of it, and is not constant: op and position."""
        for use in value.uses():
            if self.known(use.node.outputs[0]):
                yield from (one for output in use.node.outputs for one in self.readers(output))
            else:
                yield use.node, use.idx

    def _computed(self, value: onnx_ir.Value, depth: int) -> bool:
        node = value.producer()
        if node is None or node.op_type not in _KNOWN or node.domain not in DOMAINS:
            return False
        given = [one for one in node.inputs if one is not None]
        return bool(given) and all(self.known(one, depth + 1) for one in given)

    def _stored(self, value: onnx_ir.Value) -> Any:
        node = value.producer()
        if value.const_value is None and node is not None and node.op_type == "Constant":
            value.const_value = self._ir.convenience.get_const_tensor(value)
        return value.const_value

    def numbers(self, value: onnx_ir.Value) -> np.ndarray:
        """The numbers of a constant value; what DequantizeLinear gives is float32, whatever it would be rounded to."""
        stored = self._stored(value)
        if stored is not None:
            return np.asarray(stored.numpy())
        node = value.producer()
        assert node is not None
        given = [None if one is None else self.numbers(one) for one in node.inputs]
        if node.op_type == "DequantizeLinear":
            return dequantized(node, given)
        index = next(index for index, output in enumerate(node.outputs) if output is value)
        return self._evaluated(node, given, index)

    def _evaluated(self, node: onnx_ir.Node, given: list[np.ndarray | None], index: int) -> np.ndarray:
        from onnx.reference import ReferenceEvaluator

        helper = self._onnx.helper
        names = [f"i{number}" if one is not None else "" for number, one in enumerate(given)]
        proto = self._ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.extend(f"o{number}" for number in range(len(node.outputs)))
        proto.domain = ""
        feeds = {name: one for name, one in zip(names, given, strict=True) if one is not None}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(one.dtype), one.shape)
            for name, one in feeds.items()
        ]
        graph = helper.make_graph([proto], "g", inputs, [self._onnx.ValueInfoProto(name=f"o{index}")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)])
        found: Any = ReferenceEvaluator(model).run(None, feeds)
        return np.asarray(found[0])

    def shape(self, value: onnx_ir.Value) -> tuple[int, ...]:
        """The shape of a constant value, without computing it where the ops on its way tell."""
        stored = self._stored(value)
        if stored is not None:
            return tuple(int(size) for size in stored.shape)
        node = value.producer()
        assert node is not None
        first = node.inputs[0]
        if first is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity"):
            return self.shape(first)
        if first is not None and node.op_type == "Transpose":
            shape = self.shape(first)
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(shape))[::-1]
            return tuple(shape[axis] for axis in order)
        return self.numbers(value).shape

    def dtype(self, value: onnx_ir.Value) -> onnx_ir.DataType:
        """The dtype that a constant value has in the model."""
        stored = self._stored(value)
        if stored is not None:
            return stored.dtype
        node = value.producer()
        assert node is not None
        attribute = {"Cast": "to", "DequantizeLinear": "output_dtype", "QuantizeLinear": "output_dtype"}.get(
            node.op_type
        )
        if attribute is not None and attribute in node.attributes and (to := node.attributes[attribute].as_int()):
            return self._ir.DataType(to)
        place = {"DequantizeLinear": 1, "CastLike": 1, "QuantizeLinear": 2}.get(node.op_type, 0)
        source = node.inputs[place] if place < len(node.inputs) else None
        if source is None:
            return self._ir.DataType.UINT8  # of QuantizeLinear without a zero point
        return self.dtype(source)

    def leaves(self, value: onnx_ir.Value) -> tuple[list[onnx_ir.Value], onnx_ir.DataType | None]:
        """The stored values behind a constant one, and the dtype that it is quantised to on the way.

        Quantised is what comes from integers, from floats of 8 bits or fewer, or goes through QuantizeLinear.
        """
        stored = self._stored(value)
        if stored is not None:
            full = stored.dtype.is_floating_point() and stored.dtype.bitwidth > 8
            return [value], None if full else stored.dtype
        node = value.producer()
        assert node is not None
        # What only says where to (shapes, axes, splits) is no part of the numbers.
        count = len(node.inputs) if node.op_type in _ARITHMETIC | {"Concat"} else 1
        parts = [self.leaves(one) for one in itertools.islice(node.inputs, count) if one is not None]
        found = [dtype for _, dtype in parts if dtype is not None]
        if node.op_type == "QuantizeLinear":
            found = [self.dtype(value)]
        return [leaf for part, _ in parts for leaf in part], found[0] if found else None


def dequantized(node: onnx_ir.Node, given: list[np.ndarray | None]) -> np.ndarray:
    """(q - zero_point) * scale of a DequantizeLinear for the tensor, an axis, or blocks of an axis; float32."""
    q, scale = given[0], given[1]
    assert q is not None
    assert scale is not None
    zero = given[2] if len(given) > 2 else None
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    factors = [scale.astype(np.float32), np.zeros_like(scale, np.float32) if zero is None else zero.astype(np.float32)]
    if block:
        fitted = tuple(slice(0, size) for size in q.shape)
        factors = [np.repeat(one, block, axis)[fitted] for one in factors]
    elif scale.size > 1:
        factors = [one.reshape([-1 if at == axis % q.ndim else 1 for at in range(q.ndim)]) for one in factors]
    else:
        factors = [one.reshape(()) for one in factors]
    numbers: np.ndarray = (q.astype(np.float32) - factors[1]) * factors[0]
    return numbers


def attribute(node: onnx_ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def real(node: onnx_ir.Node, name: str, default: float) -> float:
    """A floating attribute of a node."""
    return float(node.attributes[name].as_float()) if name in node.attributes else default
