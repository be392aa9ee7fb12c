"""The two halves of a rank-1 update in ONNX, for each kind of product: s = x · u, and s v in the axes of its output.

    kind      product                                  s                            update
    last      x W, W on the right                      x · u over the last axis     s * v
    first     W x, W on the left                       u [1, in] @ x                v [out, 1] @ s
    window    convolution                              the same one with weight u   s * v [out, 1, 1]
    letters   Einsum                                   Einsum over the letter       Einsum with the letter

x may have any rank, and transposes are the op's own: each half is an op of the product's kind.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.exporters.onnx_file.constants import attribute
from onelora_compile.exporters.onnx_file.node_writer import Writer
from onelora_compile.exporters.quantized.products import CONVOLUTIONS, einsum_letters

if TYPE_CHECKING:
    import onnx_ir


@dataclasses.dataclass(frozen=True)
class Kind:
    """How an op reads its input; equal where two ops can share x · u with u ones.

    Attributes:
        name: "last", "first", "window" or "letters".
        details: for last and first whether x is transposed ("" | "Transpose" | "FusedMatMul"); of a window its shape
            [1, in_features, …] and attributes; of letters the equation's parts (x, in, out, output).
    """

    name: str
    details: tuple[Any, ...]


def kind_of(op: onnx_ir.Node, position: int, window: tuple[int, ...]) -> Kind:
    """The kind of a product whose weight is at a position; `window` is the weight's shape as the op reads it."""
    if op.op_type in CONVOLUTIONS:
        used = {name: held.value for name, held in op.attributes.items() if name in _WINDOW}
        return Kind("window", ((1, *window[1:]), tuple(sorted(used.items()))))
    if op.op_type == "Einsum":
        letters = einsum_letters(op, position)
        assert letters is not None
        _, row, column, source, out = letters
        return Kind("letters", (source, column, row, out))
    flag = attribute(op, "transA" if position == 1 else "transB", 0)
    how = "" if not flag else "FusedMatMul" if op.op_type == "FusedMatMul" else "Transpose"
    return Kind("last" if position == 1 else "first", (how,))


_WINDOW = {"auto_pad", "dilations", "pads", "strides", "kernel_shape"}


def feature_sum(
    writer: Writer, graph: onnx_ir.Graph, kind: Kind, x: onnx_ir.Value, columns: int, u: np.ndarray | None, label: str
) -> onnx_ir.Value:
    """The sum x · u with an entry in the place of the output's features; u None is ones [columns]."""
    after, add = writer.behind(x, graph), writer.add
    if u is None and kind == Kind("last", ("",)):  # by far the most: a reduction, which every runtime has a kernel for
        return writer.last_axis_sum(after, x)
    if u is None:
        assert x.dtype is not None
        u, label = np.ones(columns, x.dtype.numpy()), f"onelora_ones_{columns}"

    def held(*shape: int) -> onnx_ir.Value:
        return writer.constant(graph, u.reshape(shape), label)

    if kind.name == "window":
        shape, attributes = kind.details
        return add(after, "Conv", x, held(*shape), dtype=x.dtype, **dict(attributes))
    if kind.name == "letters":
        source, column, row, out = kind.details
        equation = f"{source},{column}->{out.replace(row, '')}"
        return add(after, "Einsum", x, held(-1), dtype=x.dtype, equation=equation)
    right = kind.name == "last"
    if kind.details == ("FusedMatMul",):  # of any rank
        both = (x, held(-1, 1)) if right else (held(1, -1), x)
        flags: dict[str, Any] = {"transA" if right else "transB": 1}
        return add(after, "FusedMatMul", *both, dtype=x.dtype, domain="com.microsoft", **flags)
    if kind.details == ("Transpose",):
        x = add(after, "Transpose", x, dtype=x.dtype, perm=[1, 0])
        after = writer.behind(x, graph)
    return add(after, "MatMul", *((x, held(-1, 1)) if right else (held(1, -1), x)), dtype=x.dtype)


def times_vector(
    writer: Writer, after: onnx_ir.Node, kind: Kind, s: onnx_ir.Value, v: np.ndarray, label: str
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """The constant that holds v [out_features], and the product of s and v in the axes of the product's output."""
    shape: tuple[int, ...] = (-1,)
    if kind.name == "first":
        shape = (-1, 1)
    elif kind.name == "window":
        shape = (-1, *[1] * (len(kind.details[0]) - 2))
    held = writer.constant(after.graph, v.reshape(shape), label)  # type: ignore[arg-type]
    if kind.name == "first":
        return held, writer.add(after, "MatMul", held, s, dtype=s.dtype)
    if kind.name == "letters":
        _, _, row, out = kind.details
        equation = f"{out.replace(row, '')},{row}->{out}"
        return held, writer.add(after, "Einsum", s, held, dtype=s.dtype, equation=equation)
    return held, writer.add(after, "Mul", s, held, dtype=s.dtype)
