"""The rank-1 branch beside a quantised product: exact where folding would mean to quantise again.

    y = x Wᵀ      ->   y + (x · u) v        with u ones and v the vector, where the product multiplies by W
                                            with u the vector and v ones, where it multiplies by Wᵀ (a tied weight)

and for MatMulNBits with floating zero points, which can hold the vector: (q - (z - b / scale)) * scale = W + b 1ᵀ.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.exporters.onnx_file.constants import Constants, attribute, real
from onelora_compile.exporters.onnx_file.node_writer import Writer
from onelora_compile.exporters.quantized.later_scales import later_scales, scale_of
from onelora_compile.exporters.quantized.products import INTEGER, Product
from onelora_compile.exporters.quantized.quantizers import behind_pairs
from onelora_compile.exporters.quantized.rank1_nodes import Kind, feature_sum, kind_of, times_vector

if TYPE_CHECKING:
    import onnx_ir


def into_zero_points(node: onnx_ir.Node, vector: np.ndarray, ir: Any) -> bool:
    """Put b [out_features] into the zero points of a MatMulNBits; False where they are integers or can't hold it."""
    if node.op_type != "MatMulNBits" or len(node.inputs) < 4 or node.inputs[3] is None:
        return False
    if len(node.inputs) > 4 and node.inputs[4] is not None:  # blocks by activations: not each row has all of them
        return False
    scale, zero = node.inputs[2], node.inputs[3]
    if scale is None or scale.const_value is None or zero.const_value is None or len(zero.uses()) > 1:
        return False
    if scale.is_graph_input() or zero.is_graph_input():  # a call may give others, which hold no vector
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


@dataclasses.dataclass(frozen=True)
class _Ends:
    """Where a branch begins and ends.

    Attributes:
        x: the floating input; or the quantised one, its scale (None for 1) and its zero point.
        y: the floating output.
        dtype: of both.
        factor: what the op multiplies its product by.
    """

    x: tuple[onnx_ir.Value | None, ...]
    y: onnx_ir.Value
    dtype: onnx_ir.DataType
    factor: float = 1.0


class Branches:
    """Adds branches to a model; the products of one input share a feature sum."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.writer = Writer(model)
        self.constants = Constants(model)
        # What products of one graph share; another graph's values are not there in a body.
        self.sums: dict[tuple[onnx_ir.Graph, onnx_ir.Value, Kind], onnx_ir.Value] = {}
        self.vectors: list[onnx_ir.Value] = []  # the constants that hold vectors
        self.totals: list[onnx_ir.Value] = []  # what vectors were added to
        self.opened: dict[tuple[Any, ...], onnx_ir.Value] = {}  # by graph, input, and what opens it

    def why_not(self, product: Product) -> str | None:
        """Why no branch can stand beside a product; None where one can."""
        try:
            self._ends(product)
        except ExportError as error:
            return str(error)
        return None

    def add(self, product: Product, vector: np.ndarray, name: str, across: bool = False) -> onnx_ir.Value:
        """Add (x · u) v to what a product computes.

        Args:
            product: the op and its matrix [out_features, in_features].
            vector: of the whole matrix, zero where no vector is: [out_features], or [in_features] with `across`.
            name: of the new initializer.
            across: the matrix is the transpose of the one that the vector is of.

        Returns:
            The output with the update.

        Raises:
            ExportError: the op's input or output in floating point can't be found.
        """
        graph: Any = product.op.graph
        writer, kinds = self.writer, self.writer.ir.DataType
        ends = self._ends(product)
        wide = kinds.DOUBLE if ends.dtype == kinds.DOUBLE else kinds.FLOAT
        rows, columns = product.shape
        vector = vector.astype(wide.numpy())
        u, v = (vector, np.ones(rows, wide.numpy())) if across else (None, vector)
        kind = kind_of(product.op, product.side, product.window)
        x = self._input(graph, ends, wide)
        s = self.sums.get((graph, x, kind)) if u is None else None
        if s is None:
            s = feature_sum(writer, graph, kind, x, columns, u, name)
        if u is None:
            self.sums[graph, x, kind] = s
        y = behind_pairs(ends.y, writer, self.constants)
        v, label = v * v.dtype.type(ends.factor), f"{name}.ones" if across else name
        held, update = times_vector(writer, writer.made(y), kind, s, v, label)
        self.vectors.append(held)
        if wide != ends.dtype:
            update = writer.add(writer.made(update), "Cast", update, dtype=ends.dtype, to=ends.dtype.value)
        total = writer.add(writer.made(update), "Add", y, update, dtype=ends.dtype)
        total.shape = y.shape
        writer.replace(y, total)
        self.totals.append(total)
        return total

    def _input(self, graph: onnx_ir.Graph, ends: _Ends, wide: onnx_ir.DataType) -> onnx_ir.Value:
        """The input in floating point and in the dtype of the sum; uses of one input share it."""
        x, *how = ends.x
        assert x is not None
        if not how and ends.dtype == wide:
            if x.dtype is None:
                x.dtype = wide
            return x
        key = (graph, x, *how)
        if key not in self.opened:
            new, writer = x, self.writer
            if how:
                scale, zero = self._constants(graph, *how)
                new = writer.add(writer.behind(x, graph), "DequantizeLinear", x, scale, zero, dtype=ends.dtype)
            if ends.dtype != wide:
                new = writer.add(writer.behind(new, graph), "Cast", new, dtype=wide, to=wide.value)
            self.opened[key] = new
        return self.opened[key]

    def _constants(
        self, graph: onnx_ir.Graph, scale: onnx_ir.Value | None, zero: onnx_ir.Value | None = None
    ) -> tuple[onnx_ir.Value, onnx_ir.Value | None]:
        """The scale and the zero point of an input; without a scale its numbers are taken as they are."""
        if scale is not None:
            return scale, zero
        shape: tuple[int, ...] = ()
        if zero is not None and self.constants.known(zero):  # it may be made further down than the input
            point = self.constants.numbers(zero)
            shape, zero = point.shape, self.writer.constant(graph, point, "onelora_zero_point")
        return self.writer.constant(graph, np.ones(shape, np.float32), "onelora_scale"), zero

    def _ends(self, product: Product) -> _Ends:
        """The floating input and output of a product, and what it multiplies by."""
        op, side, kind = product.op, product.side, product.op.op_type
        y = op.outputs[0]
        where = f"{kind} {op.name!r}" if op.name else kind
        x = op.inputs[INTEGER[kind][1 - side][0] if kind in INTEGER else 1 - side]
        assert x is not None
        plain = self.writer.ir.DataType.FLOAT
        if kind in ("MatMul", "Gemm", "FusedMatMul", "Conv", "Einsum"):
            if any(attribute(op, flag, 0) for flag in ("transBatchA", "transBatchB")):
                raise ExportError(f"{where} moves batch axes, and no vector can be added to that")
            weight = op.inputs[product.position]
            assert weight is not None
            return _Ends((x,), y, self.constants.dtype(weight), real(op, "alpha", 1.0))
        if kind in ("MatMulNBits", "DynamicQuantizeMatMul"):
            return _Ends((x,), y, self._scale_dtype(op, 2))
        if kind in ("MatMulInteger", "ConvInteger", "MatMulIntegerToFloat"):
            x_parts = self._source(op, side)
            if kind == "MatMulIntegerToFloat":
                return _Ends(x_parts, y, self._scale_dtype(op, 3 if side == 1 else 2))
            later = later_scales(op, self.constants)
            if later is None:
                raise ExportError(
                    f"{where} is not followed by Cast and Mul with the scale of its input, so its product has no "
                    "floating form that a vector could be added to"
                )
            return _Ends(x_parts, later.y, plain)
        raise ExportError(
            f"{where} computes more than a product inside, so no vector can be added to that: quantise a model whose "
            "attention and activations are not fused, or fold before quantising"
        )

    def _source(self, op: onnx_ir.Node, side: int) -> tuple[onnx_ir.Value | None, ...]:
        """The input of an integer op: what DynamicQuantizeLinear had, or the quantised one and what opens it."""
        q_at, scale_at, zero_at = INTEGER[op.op_type][1 - side]
        q = op.inputs[q_at]
        assert q is not None
        maker = q.producer()
        if maker is not None and maker.op_type == "DynamicQuantizeLinear":
            return (maker.inputs[0],)
        zero = op.inputs[zero_at] if zero_at is not None and zero_at < len(op.inputs) else None
        if scale_at is not None:
            return (q, op.inputs[scale_at], zero)
        if maker is not None and maker.op_type == "QuantizeLinear":
            return (q, *maker.inputs[1:3])
        return (q, scale_of(q), zero)

    def _scale_dtype(self, op: onnx_ir.Node, index: int) -> onnx_ir.DataType:
        scale = op.inputs[index]
        assert scale is not None
        return self.constants.dtype(scale)
