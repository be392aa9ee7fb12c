"""The rank-1 branch beside a quantised matmul: exact where folding would mean to quantise again.

    y = matmul(x, dequantised W)   ->   y + sum(x) * b

and for MatMulNBits with floating zero points, which can hold the vector: (q - (z - b / scale)) * scale = W + b 1ᵀ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.exporters.operators import Lowering

if TYPE_CHECKING:
    import onnx_ir


def into_zero_points(node: onnx_ir.Node, vector: np.ndarray, ir: Any) -> bool:
    """Put b [out_features] into the zero points of a MatMulNBits; False where they are integers or can't hold it."""
    if node.op_type != "MatMulNBits" or len(node.inputs) < 4 or node.inputs[3] is None:
        return False
    scale, zero = node.inputs[2], node.inputs[3]
    if scale is None or scale.const_value is None or zero.const_value is None or len(zero.uses()) > 1:
        return False
    old = np.asarray(zero.const_value.numpy())
    if old.dtype != np.float32:  # narrower ones would round the vector away
        return False
    scales = scale.const_value.numpy().astype(np.float64).reshape(len(vector), -1)
    if not scales.all():
        return False
    new = old.astype(np.float64).reshape(scales.shape) - vector[:, None].astype(np.float64) / scales
    zero.const_value = ir.tensor(new.astype(np.float32).reshape(old.shape), name=zero.name)
    return True


class Branches:
    """Adds branches to a model; the uses of one input share a feature sum."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.model = model
        self.lowering: dict[int, Lowering] = {}
        self.sums: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self.opened: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def add(self, op: onnx_ir.Node, vector: np.ndarray, name: str) -> None:
        """Add sum(x) * b to what an op computes.

        Args:
            op: the quantised matmul, or the MatMul or Gemm behind DequantizeLinear.
            vector: b [out_features] of the whole weight of the op, zero where no vector is.
            name: of the new initializer.

        Raises:
            ExportError: the op's input or output in floating point can't be found.
        """
        assert op.graph is not None
        graph: Any = op.graph
        lowering = self.lowering.setdefault(id(graph), Lowering(graph))
        ir = lowering.ir
        x, y, factor = self._ends(op, lowering)
        after = y.producer()
        assert after is not None
        kinds = ir.DataType
        dtype = _dtype(op, x, y) or kinds.FLOAT
        half = dtype in (kinds.FLOAT16, kinds.BFLOAT16)
        if x not in self.sums:
            # Before the first op that reads x: op is only the first of those that fold.
            first = min((user.node for user in x.uses() if user.node.graph is graph), key=list(graph).index, default=op)
            wide = lowering.add(first, "Cast", x, to=kinds.FLOAT.value) if half else x
            self.sums[x] = lowering.add(first, "ReduceSum", wide, lowering.constant(-1), keepdims=1)
            self.sums[x].dtype = kinds.FLOAT
        own = lowering.initializer(name, ir.tensor((vector * factor).astype(np.float32), name=name))
        users = list(y.uses())
        update = ir.node("Mul", [self.sums[x], own])
        nodes = [update]
        if half:
            nodes.append(ir.node("Cast", [update.outputs[0]], {"to": dtype.value}))
        total = ir.node("Add", [y, nodes[-1].outputs[0]])
        graph.insert_after(after, [*nodes, total])
        new = total.outputs[0]
        new.dtype, new.shape = dtype, y.shape
        for user in users:
            user.node.replace_input_with(user.idx, new)
        if y.is_graph_output():
            place = list(graph.outputs).index(y)
            graph.outputs[place] = new
            new.name, y.name = y.name, f"{y.name}_without_vector"

    def _around(self, op: onnx_ir.Node, lowering: Lowering) -> onnx_ir.Value:
        """The floating input of a QLinearMatMul; uses of one quantised input share it."""
        q = op.inputs[0]
        assert q is not None
        if q not in self.opened:
            self.opened[q] = lowering.add(op, "DequantizeLinear", *op.inputs[0:3])  # type: ignore[arg-type]
            self.opened[q].dtype = lowering.ir.DataType.FLOAT
        return self.opened[q]

    def _ends(self, op: onnx_ir.Node, lowering: Lowering) -> tuple[onnx_ir.Value, onnx_ir.Value, float]:
        """The floating input and output of the op, and what its product is multiplied by."""
        x, y, kind = op.inputs[0], op.outputs[0], op.op_type
        assert x is not None
        if kind in ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul"):
            return x, y, 1.0
        if kind == "FusedMatMul" and not _flag(op, "transA"):
            return x, y, _number(op, "alpha", 1.0)
        if kind == "Gemm" and not _flag(op, "transA"):
            return x, y, _number(op, "alpha", 1.0)
        if kind in ("MatMulInteger", "MatMulIntegerToFloat"):
            source = x.producer()
            if source is not None and source.op_type == "DynamicQuantizeLinear" and source.inputs[0] is not None:
                return source.inputs[0], y if kind == "MatMulIntegerToFloat" else _scaled(y), 1.0
        if kind == "QLinearMatMul":
            return self._around(op, lowering), _reopened(op, lowering), 1.0
        raise ExportError(f"{op.name or kind}: {kind} has no floating input and output to add a vector to")


def _dtype(op: onnx_ir.Node, x: onnx_ir.Value, y: onnx_ir.Value) -> onnx_ir.DataType | None:
    """Of the op in floating point: values of foreign models need not say it, scales do."""
    known = [y, x] + [value for value in op.inputs[2:3] if value is not None and op.op_type == "MatMulNBits"]
    return next((value.dtype for value in known if value.dtype is not None), None)


def _reopened(op: onnx_ir.Node, lowering: Lowering) -> onnx_ir.Value:
    """The output of a QLinearMatMul in floating point, which is quantised again after it."""
    ir, graph, y = lowering.ir, op.graph, op.outputs[0]
    assert graph is not None
    users = list(y.uses())
    opened = ir.node("DequantizeLinear", [y, *op.inputs[6:8]])
    closed = ir.node("QuantizeLinear", [opened.outputs[0], *op.inputs[6:8]])
    opened.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_after(op, [opened, closed])
    for user in users:
        user.node.replace_input_with(user.idx, closed.outputs[0])
    value: onnx_ir.Value = opened.outputs[0]
    return value


def _scaled(y: onnx_ir.Value) -> onnx_ir.Value:
    """The product of a MatMulInteger in floating point: after its Cast and the multiplication with the scales."""
    for wanted in ("Cast", "Mul"):
        users = [use.node for use in y.uses()]
        if len(users) != 1 or users[0].op_type != wanted:
            raise ExportError("MatMulInteger is not followed by Cast and Mul, so its product has no floating form")
        y = users[0].outputs[0]
    return y


def _flag(op: onnx_ir.Node, name: str) -> bool:
    return bool(op.attributes[name].as_int()) if name in op.attributes else False


def _number(op: onnx_ir.Node, name: str, default: float) -> float:
    return float(op.attributes[name].as_float()) if name in op.attributes else default
