"""Heads and norms in a bank: each row of the batch is computed with the values of its own adapter.

    MatMul(x, W), Gemm(x, W, c)          x @ rows(W) + rows(c)
    LayerNormalization(x, g, c), RMS…    the norm with ones, then * rows(g) + rows(c)
    BatchNormalization(x, g, c, m, v)    (x - rows(m)) * (rows(g) / sqrt(rows(v) + epsilon)) + rows(c)
    Add, Mul, Sub, Div (x, p)            the same with rows(p)

rows(p) is Gather(table, adapter_ids), the table [adapters + 1, …] laid out so that it meets x at the axis of the batch.
What stands between a parameter and such an operator (Transpose, Unsqueeze, …) is computed now, for every adapter.  Any
other use has no row for each adapter, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.exporters.to_onnx.operators import OperatorWriter

if TYPE_CHECKING:
    import onnx_ir

_MOVED = ("Transpose", "Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity")
_ELEMENTWISE = ("Add", "Mul", "Sub", "Div")


class TrainedRows:
    """Rewrites the uses of trained parameters in one graph.

    Args:
        writer: of the graph.
        ids: the input that chooses.
        batch_axis: which axis of a value is the batch; refuses by the name of the parameter.
        table: for a value that is made of a parameter alone: its numbers for each adapter, the base last.
    """

    def __init__(
        self,
        writer: OperatorWriter,
        ids: onnx_ir.Value,
        batch_axis: Callable[[onnx_ir.Value, str], int],
        table: Callable[[onnx_ir.Value, str], np.ndarray],
    ) -> None:
        self.writer, self.ids = writer, ids
        self.batch_axis, self.table = batch_axis, table

    def place(self, marks: Sequence[tuple[onnx_ir.Value, str]]) -> None:
        """Give every op that reads these parameters the rows of its batch.

        Raises:
            ExportError: an op that has no such form, by the parameter's name.
        """
        made = dict(marks)
        pending = list(marks)
        readers: dict[onnx_ir.Node, str] = {}
        while pending:
            value, name = pending.pop()
            for use in value.uses():
                if use.node.op_type in _MOVED and use.idx == 0:
                    made[use.node.outputs[0]] = name
                    pending.append((use.node.outputs[0], name))
                else:
                    readers.setdefault(use.node, name)
        for node, name in readers.items():
            rewrite = _REWRITES.get(node.op_type)
            x = node.inputs[0] if node.op_type not in _ELEMENTWISE else _other(node, made)
            if rewrite is None or x is None or x in made or x.shape is None or node.graph is not self.writer.graph:
                raise ExportError(
                    f"{name!r} is used by {node.op_type}, which has no row for each adapter: a bank can't hold it; "
                    "export with adapters='input' or 'load', or train it in no adapter of the bank"
                )
            x.shape = _shape(x)
            _Site(self, node, x, made).rewrite(rewrite)


def _other(node: onnx_ir.Node, made: dict[onnx_ir.Value, str]) -> onnx_ir.Value | None:
    free = [value for value in node.inputs if value is not None and value not in made]
    return free[0] if len(free) == 1 else None


def _shape(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    """The shape of a value, also where torch.onnx loses it: what GroupNorm becomes is laid out "like another value"."""
    node = value.producer()
    known = value.shape is not None and all(isinstance(size, int) or size.value for size in value.shape)
    if known or node is None:
        return value.shape
    if node.op_type == "Reshape" and node.inputs[1] is not None:
        like = node.inputs[1].producer()
        if like is not None and like.op_type == "Shape" and like.inputs[0] is not None:
            return _shape(like.inputs[0])
    if node.op_type in _ELEMENTWISE:
        sides = [one for one in node.inputs if one is not None and one.shape is not None]
        return _shape(max(sides, key=lambda one: len(one.shape or ()))) if sides else value.shape
    return value.shape


class _Site:
    """One op that reads parameters of a bank."""

    def __init__(
        self, owner: TrainedRows, node: onnx_ir.Node, x: onnx_ir.Value, made: dict[onnx_ir.Value, str]
    ) -> None:
        self.owner, self.node, self.x, self.made = owner, node, x, made
        self.ir: Any = owner.writer.ir
        names = [made[value] for value in node.inputs if value in made]
        self.name = names[0]
        assert x.shape is not None
        self.rank = len(x.shape)
        self.axis = owner.batch_axis(x, self.name)

    def rewrite(self, build: Callable[[_Site], onnx_ir.Value]) -> None:
        """Put what `build` makes in the place of the op."""
        if any(one.uses() for one in self.node.outputs[1:]):
            raise ExportError(f"{self.name!r}: {self.node.op_type} has further outputs, which a bank can't give")
        self.node.resize_outputs(1)
        self.owner.writer.replace(self.node, build(self))

    def op(self, op_type: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        """An operator before the one that is replaced, of the dtype of its first input."""
        return self.owner.writer.typed(self.owner.writer.add(self.node, op_type, *inputs, **attributes), inputs[0])

    def operand(self, position: int, shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None) -> Any:
        """An input of the op, as rows if it is a parameter of the bank; None where it is absent.

        Args:
            position: of the input.
            shape: how its own shape is to be seen beside x, of the rank of x; None pads it in front.
        """
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        if value is None:
            return None
        if value not in self.made:
            if shape is None or value.shape is None:
                return value
            sizes = self.owner.writer.constant(*shape(value.shape.numpy()))
            return self.op("Reshape", value, sizes)
        table = self.owner.table(value, self.made[value])
        own = table.shape[1:]
        seen = shape(own) if shape is not None else (1,) * (self.rank - len(own)) + own
        if any(size != 1 for size in seen[: self.axis + 1]):
            raise ExportError(f"{self.made[value]!r} {list(own)} varies along the batch of {list(self.x.shape or ())}")
        return self.gathered(table.reshape(len(table), *seen[self.axis + 1 :]), self.made[value])

    def gathered(self, table: np.ndarray, name: str) -> onnx_ir.Value:
        """The rows of a table [adapters + 1, …] in the dtype of x."""
        writer = self.owner.writer
        while name in writer.graph.initializers:
            name += "_"
        held = writer.initializer(name, self.ir.tensor(np.ascontiguousarray(table, np.float32), name=name))
        rows = writer.add(self.node, "Gather", held, self.owner.ids, axis=0)
        rows.dtype = self.ir.DataType.FLOAT
        assert self.x.dtype is not None
        return writer.cast(self.node, rows, self.x.dtype)

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute of the op."""
        return self.node.attributes[name].value if name in self.node.attributes else default


def _elementwise(site: _Site) -> onnx_ir.Value:
    first, second = (site.operand(0), site.operand(1))
    return site.op(site.node.op_type, first, second)


def _matmul(site: _Site) -> onnx_ir.Value:
    return _product(site, transposed=False)


def _gemm(site: _Site) -> onnx_ir.Value:
    if site.attribute("alpha", 1.0) != 1 or site.attribute("beta", 1.0) != 1 or site.attribute("transA", 0):
        raise ExportError(f"{site.name!r} is used by a scaled Gemm, which a bank can't hold")
    y = _product(site, transposed=bool(site.attribute("transB", 0)))
    bias = site.operand(2)
    return y if bias is None else site.op("Add", y, bias)


def _product(site: _Site, transposed: bool) -> onnx_ir.Value:
    """X @ rows(W): x meets W [in, out] of its row by the rules of MatMul for stacks."""
    weight = site.node.inputs[1]
    assert weight is not None
    if weight not in site.made:  # the bias alone is trained
        other = site.op("Transpose", weight, perm=[1, 0]) if transposed else weight
        return site.op("MatMul", site.x, other)
    table = site.owner.table(weight, site.made[weight])
    if table.ndim != 3:
        raise ExportError(f"{site.name!r} is used by {site.node.op_type} as {list(table.shape[1:])}: no bank of it")
    table = table.swapaxes(1, 2) if transposed else table
    alone = site.axis == site.rank - 2  # [..., batch, in]: each row is a matrix of its own
    x = site.op("Unsqueeze", site.x, site.owner.writer.constant(-2)) if alone else site.x
    between = 0 if alone else site.rank - 3 - site.axis
    rows = site.gathered(table.reshape(len(table), *(1,) * between, *table.shape[1:]), site.made[weight])
    y = site.op("MatMul", x, rows)
    return site.op("Squeeze", y, site.owner.writer.constant(-2)) if alone else y


def _norm(site: _Site) -> onnx_ir.Value:
    """The norm without its parameters, and these after it."""
    scale = site.node.inputs[1]
    assert scale is not None
    shape = scale.shape.numpy() if scale.shape is not None else ()
    assert site.x.dtype is not None
    ones = site.ir.tensor(np.ones(shape, np.float32).astype(site.x.dtype.numpy()), name=f"{site.name}.ones")
    held = site.owner.writer.graph.initializers.get(f"{site.name}.ones")
    held = held if held is not None else site.owner.writer.initializer(f"{site.name}.ones", ones)
    attributes = {name: one.value for name, one in site.node.attributes.items()}
    y = site.op("Mul", site.op(site.node.op_type, site.x, held, **attributes), site.operand(1))
    bias = site.operand(2)
    return y if bias is None else site.op("Add", y, bias)


def _batch_norm(site: _Site) -> onnx_ir.Value:
    def channels(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape, *(1,) * (site.rank - 2))

    scale, bias, mean, variance = (site.operand(position, channels) for position in (1, 2, 3, 4))
    assert site.x.dtype is not None
    epsilon = np.array(site.attribute("epsilon", 1e-5), np.float32).astype(site.x.dtype.numpy())
    own = site.owner.writer.initializer(f"{site.name}.epsilon", site.ir.tensor(epsilon, name=f"{site.name}.epsilon"))
    factor = site.op("Div", scale, site.op("Sqrt", site.op("Add", variance, own)))
    return site.op("Add", site.op("Mul", site.op("Sub", site.x, mean), factor), bias)


_REWRITES: dict[str, Callable[[_Site], Any]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "BatchNormalization": _batch_norm,
}
