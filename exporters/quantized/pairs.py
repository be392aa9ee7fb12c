"""Quantised operators as floating ones between DequantizeLinear and QuantizeLinear, with the same numbers.

    QLinearConv(x, …, w, …, y_scale, y_zero)   ->   QuantizeLinear(Conv(DequantizeLinear(x), DequantizeLinear(w)))

and alike for the matmuls and what ONNX Runtime's quantiser writes between them.  A branch needs a floating output.
ONNX Runtime and TensorRT make integer kernels of this form; the latter reads no other.
Source: ONNX Runtime's docs/ContribOperators.md (1.32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.exporters.onnx_file.constants import Constants, attribute
from onelora_compile.exporters.onnx_file.node_writer import Writer
from onelora_compile.exporters.onnx_file.overridable import fix

if TYPE_CHECKING:
    import onnx_ir

# op -> (floating op, positions of its quantised inputs with scale and zero point, positions of the output's two)
_OPERATORS: dict[str, tuple[str, tuple[tuple[int, int, int], ...], tuple[int, int]]] = {
    "QLinearMatMul": ("MatMul", ((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearConv": ("Conv", ((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QGemm": ("Gemm", ((0, 1, 2), (3, 4, 5)), (7, 8)),
    "QLinearAdd": ("Add", ((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearMul": ("Mul", ((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearSigmoid": ("Sigmoid", ((0, 1, 2),), (3, 4)),
    "QLinearLeakyRelu": ("LeakyRelu", ((0, 1, 2),), (3, 4)),
    "QLinearSoftmax": ("Softmax", ((0, 1, 2),), (3, 4)),
    "QLinearAveragePool": ("AveragePool", ((0, 1, 2),), (3, 4)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", ((0, 1, 2),), (3, 4)),
}
_BIAS = {"QLinearConv": 8, "QGemm": 6}
_DROPPED = ("channels_last", "opset")  # attributes that only the quantised ones have


def open_operators(model: onnx_ir.Model) -> int:
    """Rewrite the quantised operators of a model in place; returns how many there were.

    Leaves alone: operators whose scales are computed, or that are in another layout.
    """
    opener = _Opener(model)
    nodes = [node for node in model.graph.all_nodes() if node.op_type in (*_OPERATORS, "QLinearConcat")]
    if nodes and "com.microsoft" not in model.opset_imports:
        model.opset_imports["com.microsoft"] = 1
    return sum(opener.open(node) for node in nodes)


class _Opener:
    def __init__(self, model: onnx_ir.Model) -> None:
        self.writer = Writer(model)
        self.constants = Constants(model)
        self.opened: dict[tuple[Any, ...], onnx_ir.Value] = {}

    def open(self, node: onnx_ir.Node) -> bool:
        """Rewrite one operator."""
        if node.op_type == "QLinearConcat":
            op_type, places, out = "Concat", tuple((at, at + 1, at + 2) for at in range(2, len(node.inputs), 3)), (0, 1)
        else:
            op_type, places, out = _OPERATORS[node.op_type]
        given: list[Any] = [[_input(node, at) for at in place] for place in places]
        scales = [one[1] for one in given] + [_input(node, out[0])]
        known = all(scale is None or self.constants.known(scale) for scale in scales)
        if not known or attribute(node, "channels_last", 0) or any(q is None for q, _, _ in given):
            return False
        graph: Any = node.graph
        axes = [self._axis(node, side, one[0]) for side, one in enumerate(given)]
        if node.op_type in _BIAS or op_type == "MatMul":
            given = self._unsigned(graph, given)
        inputs = [self._opened(graph, q, scale, zero, axis) for (q, scale, zero), axis in zip(given, axes, strict=True)]
        bias = _input(node, _BIAS.get(node.op_type))
        if bias is not None:
            inputs.append(self._bias(graph, bias, given))
        attributes = {name: held.value for name, held in node.attributes.items() if name not in _DROPPED}
        value = self.writer.add(
            node, op_type, *inputs, dtype=inputs[0].dtype, name=f"{node.name}_floating", **attributes
        )
        scale, zero = (_input(node, at) for at in out)
        if scale is not None:
            dtype = self.constants.dtype(zero) if zero is not None else self.writer.ir.DataType.UINT8
            value = self.writer.add(self.writer.made(value), "QuantizeLinear", value, scale, zero, dtype=dtype)
        value.shape = node.outputs[0].shape
        self.writer.replace(node.outputs[0], value)
        held = [one for one in node.inputs if one is not None and one.is_initializer()]
        graph.remove(node, safe=True)
        for one in held:
            fix(one)  # of its numbers others were made: a bias's scale, weights around 128
            if not one.uses() and one.graph is not None:
                one.graph.initializers.pop(one.name or "", None)
        return True

    def _unsigned(self, graph: onnx_ir.Graph, given: list[Any]) -> list[Any]:
        """Signed weights beside signed inputs as the same numbers around 128.

        ONNX Runtime makes signed pairs of activations unsigned on x86, and its kernels for unsigned by signed numbers
        saturate inside on processors without VNNI (seen: an error of 0.2 where the quantised operator had 0.009).
        """
        signed = self.writer.ir.DataType.INT8
        kinds = [self._kind(q, zero) for q, _, zero in given]
        for side, (q, scale, zero) in enumerate(given):
            if not self.constants.known(q) or self.constants.known(given[1 - side][0]) or kinds != [signed, signed]:
                continue
            at = np.zeros((), np.int16) if zero is None else self.constants.numbers(zero).astype(np.int16)
            numbers = (self.constants.numbers(q).astype(np.int16) + 128).astype(np.uint8)
            key = ("unsigned", graph, q)
            if key not in self.opened:
                self.opened[key] = self.writer.constant(graph, numbers, f"{q.name}_unsigned")
            point = np.broadcast_to(at + 128, self.constants.shape(scale)).astype(np.uint8)
            given[side] = [self.opened[key], scale, self.writer.constant(graph, point, f"{q.name}_unsigned_zero_point")]
        return given

    def _kind(self, q: onnx_ir.Value, zero: onnx_ir.Value | None) -> onnx_ir.DataType | None:
        """The dtype of a quantised input, which foreign models need not say."""
        if q.dtype is not None or zero is None or not self.constants.known(zero):
            return q.dtype
        return self.constants.dtype(zero)

    def _axis(self, node: onnx_ir.Node, side: int, q: onnx_ir.Value | None) -> int:
        """The axis that scales of an input belong to, where there are several."""
        if node.op_type == "QLinearConv":
            return 0
        if node.op_type == "QGemm":
            return 0 if attribute(node, "transB", 0) else 1
        assert q is not None
        rank = len(self.constants.shape(q)) if self.constants.known(q) else len(q.shape or (1, 1))
        return rank - 1 if side else rank - 2

    def _opened(
        self, graph: onnx_ir.Graph, q: onnx_ir.Value, scale: onnx_ir.Value, zero: onnx_ir.Value | None, axis: int
    ) -> onnx_ir.Value:
        """A quantised value in floating point; readers of one value share it."""
        key = (graph, q, scale, zero, axis)
        if key not in self.opened:
            if zero is not None and self.constants.shape(zero) != self.constants.shape(scale):  # one for many scales
                numbers = np.broadcast_to(self.constants.numbers(zero).reshape(-1), self.constants.shape(scale)).copy()
                zero = self.writer.constant(graph, numbers, f"{zero.name}_of_each")
            after, add, dtype = self.writer.behind(q, graph), self.writer.add, self.constants.dtype(scale)
            if int(np.prod(self.constants.shape(scale))) == 1:
                new = add(after, "DequantizeLinear", q, scale, zero, dtype=dtype)
            else:
                # Before opset 13 the standard's knows one scale only.  Cast, Sub and Mul would be folded by ONNX
                # Runtime, which then quantises the result once more with one scale for all (seen: 30 times the error).
                domain = "" if self.writer.opset >= 13 else "com.microsoft"
                new = add(after, "DequantizeLinear", q, scale, zero, dtype=dtype, domain=domain, axis=axis)
            self.opened[key] = new
        return self.opened[key]

    def _bias(self, graph: onnx_ir.Graph, bias: onnx_ir.Value, given: list[Any]) -> onnx_ir.Value:
        """The bias of a QLinearConv or QGemm, integers in units of both scales, in floating point."""
        scales = [self.constants.numbers(scale).reshape(-1) for _, scale, _ in given]
        scale = self.writer.constant(graph, scales[0] * scales[1], f"{bias.name}_scale")
        if scale.const_value.size == 1:  # type: ignore[union-attr]
            scale.const_value = self.writer.ir.tensor(scale.const_value.numpy().reshape(()), name=scale.name)  # type: ignore[union-attr]
            scale.shape = self.writer.ir.Shape(())
        rank = len(self.constants.shape(bias)) if self.constants.known(bias) else len(bias.shape or (1,))
        return self._opened(graph, bias, scale, None, rank - 1)


def _input(node: onnx_ir.Node, index: int | None) -> onnx_ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None
