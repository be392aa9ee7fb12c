"""Find the weights of an ONNX model, whatever wrote it, and what each is used for.

A weight is a constant matrix: an initializer or a Constant node, in the main graph or in a body of If and Loop; stored
as it is, or quantised behind DequantizeLinear, MatMulNBits and the integer matmuls.  A use is a way from there, through
ops that only move or convert values, to the op that computes with it.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import require
from onelora_compile.exporters.load_onnx import by_rows
from onelora_compile.exporters.quantized import dequantized

if TYPE_CHECKING:
    import onnx_ir

_PASSED = {"Identity", "Cast", "Transpose", "DequantizeLinear", "Squeeze", "Unsqueeze", "Reshape"}
# The op and the position of its weight: what is linear in another input of the op.
_LINEAR = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedMatMul": (0, 1),
    "FusedGemm": (0, 1),
    "Einsum": (0, 1),
    "Conv": (1,),
    "FusedConv": (1,),
    "Attention": (1,),
    "QAttention": (1,),
    "MatMulNBits": (1,),
    "MatMulInteger": (1,),
    "DynamicQuantizeMatMul": (1,),
    "MatMulIntegerToFloat": (1,),
    "QLinearMatMul": (3,),
    "GemmFastGelu": (1,),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One way of a weight to an op.

    Attributes:
        nodes: what it passes, the op that computes last.
        position: the input of that op.
    """

    nodes: tuple[onnx_ir.Node, ...]
    position: int

    @property
    def op(self) -> onnx_ir.Node:
        """The op that computes with the weight."""
        return self.nodes[-1]

    @property
    def linear(self) -> bool:
        """Whether the op is linear in another input; a Gather of an embedding is not."""
        return self.position in _LINEAR.get(self.op.op_type, ())

    @property
    def modules(self) -> tuple[str, ...]:
        """Where exporters say that the op comes from: module paths, innermost last; empty if they do not."""
        scopes = self.op.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes:
            try:
                return tuple(str(scope) for scope in ast.literal_eval(scopes))[:-1]  # the last is the op itself
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return ()
        name = self.op.name or ""
        return (".".join(name.strip("/").split("/")[:-1]),) if name.startswith("/") else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A constant matrix of a model.

    Attributes:
        value: the graph's value that holds its numbers, or the quantised ones.
        shape: (rows, columns) of the matrix as it is stored, or as it is dequantised.
        dtype: of storage: "float32", …, "int8", "int4".
        uses: what it is used for.
        quantized: the node that dequantises it, or computes with it as it is; None for plain numbers.
    """

    value: onnx_ir.Value
    shape: tuple[int, int]
    dtype: str
    uses: tuple[Use, ...]
    quantized: onnx_ir.Node | None

    @property
    def name(self) -> str:
        """Of the initializer."""
        return self.value.name or "a constant"

    def by_rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The numbers, floating point, some rows [n, columns] at a time with the first one's number."""
        if self.quantized is not None:
            found = dequantized(self.quantized, self.value)
            assert found is not None
            yield 0, found
        else:
            yield from by_rows(self.value.const_value, self.shape)


def weights_of(model: onnx_ir.Model) -> list[Weight]:
    """The weights of a model, in the order of its graphs."""
    found = []
    for value in _constants(model):
        tensor = value.const_value
        if tensor is None:
            continue
        uses = tuple(_uses(value))
        quantized = next((node for use in uses for node in use.nodes if _dequantizes(node, value)), None)
        if quantized is not None:
            numbers = dequantized(quantized, value)
            if numbers is not None:
                bits = _bits(quantized, tensor)
                found.append(Weight(value, numbers.shape, f"int{bits}", uses, quantized))
            continue
        shape = tuple(tensor.shape)
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]  # of a 1x1 convolution
        if len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape) and _floating(tensor):
            found.append(Weight(value, shape, tensor.dtype.name.lower(), uses, None))  # type: ignore[arg-type]
    names = {"float": "float32", "double": "float64"}
    return [dataclasses.replace(weight, dtype=names.get(weight.dtype, weight.dtype)) for weight in found]


def _constants(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    ir = require("onnx_ir", "onnx", "fold into an ONNX model")
    for graph in [model.graph, *model.graph.subgraphs()]:
        inputs = set(graph.inputs) if graph is not model.graph else set()
        yield from (value for value in graph.initializers.values() if value not in inputs)
        for node in graph:
            if node.op_type == "Constant" and "value" in node.attributes:
                value = node.outputs[0]
                if value.const_value is None:
                    value.const_value = ir.convenience.get_const_tensor(value)
                yield value


def _uses(value: onnx_ir.Value, before: tuple[onnx_ir.Node, ...] = ()) -> Iterator[Use]:
    for user in value.uses():
        nodes = (*before, user.node)
        if user.node.op_type in _PASSED and user.idx == 0 and len(nodes) < 16:
            yield from _uses(user.node.outputs[0], nodes)
        else:
            yield Use(nodes, user.idx)


def _dequantizes(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    return dequantized(node, value, look=True) is not None


def _bits(node: onnx_ir.Node, tensor: Any) -> int:
    if node.op_type == "MatMulNBits":
        return int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4
    return int(tensor.dtype.bitwidth)


def _floating(tensor: Any) -> bool:
    return bool(tensor.dtype.is_floating_point()) and tensor.dtype.bitwidth >= 16
