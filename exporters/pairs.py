"""Quantised operators as floating ones between DequantizeLinear and QuantizeLinear, with the same numbers.

    QLinearConv(x, …, w, …, y_scale, y_zero)   ->   QuantizeLinear(Conv(DequantizeLinear(x), DequantizeLinear(w)))

and alike for the matmuls and what ONNX Runtime's quantiser writes between them.  A branch needs a floating output.
ONNX Runtime and TensorRT make integer kernels of this form; the latter reads no other.
Source: ONNX Runtime's docs/ContribOperators.md (1.32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.exporters.constants import Constants, attribute
from onelora_compile.exporters.writing import Writer

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
        given = [[_input(node, at) for at in place] for place in places]
        scales = [one[1] for one in given] + [_input(node, out[0])]
        known = all(scale is None or self.constants.known(scale) for scale in scales)
        if not known or attribute(node, "channels_last", 0) or any(q is None for q, _, _ in given):
            return False
        graph: Any = node.graph
        axes = [self._axis(node, side, one[0]) for side, one in enumerate(given)]
        inputs = [self._opened(graph, *one, axis) for one, axis in zip(given, axes, strict=True)]
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
        graph.remove(node, safe=True)
        return True

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
            elif self.writer.opset >= 13:
                new = add(after, "DequantizeLinear", q, scale, zero, dtype=dtype, axis=axis)
            else:
                new = self._opened_by_axis(graph, q, scale, zero, axis)
            self.opened[key] = new
        return self.opened[key]

    def _opened_by_axis(
        self, graph: onnx_ir.Graph, q: onnx_ir.Value, scale: onnx_ir.Value, zero: onnx_ir.Value | None, axis: int
    ) -> onnx_ir.Value:
        """The same before opset 13, whose DequantizeLinear knows one scale only: (q - zero) * scale."""
        dtype, writer = self.constants.dtype(scale), self.writer
        rank = len(self.constants.shape(q))
        shape = [-1 if at == axis else 1 for at in range(rank)]
        new = writer.add(writer.behind(q, graph), "Cast", q, dtype=dtype, to=dtype.value)
        for op_type, one in (("Sub", zero), ("Mul", scale)):
            if one is not None:
                numbers = self.constants.numbers(one).astype(dtype.numpy()).reshape(shape)
                held = writer.constant(graph, numbers, f"{one.name}_by_axis")
                new = writer.add(writer.made(new), op_type, new, held, dtype=dtype)
        return new

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
