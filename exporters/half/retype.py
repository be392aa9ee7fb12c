"""Give the operators of a model other dtypes, with as few casts as that takes.

    Relu(x) -> Exp -> Mul       with Exp in float32:       Relu -> Cast -> Exp -> Cast -> Mul

A value has the dtype of the operator that makes it.  It is cast where an operator of another dtype reads it, once for
all of these; between operators of one dtype there is no cast.  Constants are stored in the dtype that their readers
want, so what stays in float32 reads numbers that were never rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.exporters.onnx_file.load import read_tensor
from onelora_compile.exporters.onnx_file.node_writer import Writer
from onelora_compile.exporters.opsets.one_node import constant_of

if TYPE_CHECKING:
    import onnx_ir

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
# Operators whose output has a dtype of its own, and inputs that have one whatever the others are.
_SAYS_ITSELF = {
    "Cast": "to",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniformLike": "dtype",
    "EyeLike": "dtype",
}
OWN_INPUTS = {
    "Resize": (1, 2),
    "QuantizeLinear": (1,),
    "DequantizeLinear": (1,),
    "Cast": (0,),
    "IsNaN": (0,),
    "IsInf": (0,),
}
_FREE = ("Cast", "Shape", "Size", "IsNaN", "IsInf")  # read any dtype


def retype(
    model: onnx_ir.Model, wanted: Mapping[onnx_ir.Node, onnx_ir.DataType], swappable: Collection[str] = ()
) -> int:
    """Change the dtype that operators compute in, in place.

    Args:
        model: the dtypes of its values are known.
        wanted: for some operators their dtype, float16 or float32; the others stay. An operator with a body keeps what
            is in it: name it, and none of its nodes, with the dtype that the body has.
        swappable: initializers that others replace by name: they are cast where they are read, and stay.

    Returns:
        The number of casts of computed values that were put in.
    """
    work = _Retyping(model, frozenset(swappable))
    for node, dtype in wanted.items():
        work.outputs(node, dtype)
    for node, dtype in wanted.items():
        work.inputs(node, dtype)
    for node in list(model.graph.all_nodes()):
        if node not in wanted:
            work.kept(node)
    work.finish()
    return work.casts


class _Retyping:
    """The casts that one call has made."""

    def __init__(self, model: onnx_ir.Model, swappable: frozenset[str]) -> None:
        self.model, self.writer, self.swappable = model, Writer(model), swappable
        self.made: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = {}
        self.before = {value: value.dtype for value in _values(model)}
        self.constants = {value: constant_of(value) for value in self.before}  # before any is rounded
        self.casts = 0

    def outputs(self, node: onnx_ir.Node, dtype: onnx_ir.DataType) -> None:
        """Let an operator's floating outputs be of a dtype."""
        attribute = _SAYS_ITSELF.get(node.op_type)
        for value in node.outputs:
            if value.dtype is not None and value.dtype.name in FLOATS:
                value.type = self.writer.ir.TensorType(dtype)  # a copy of a model shares the types of the original
                if attribute is not None and attribute in node.attributes:
                    node.attributes[attribute] = self.writer.ir.AttrInt64(attribute, dtype.value)
        held = node.attributes.get("value")
        if node.op_type in ("Constant", "ConstantOfShape") and held is not None and held.type.name == "TENSOR":
            tensor = held.as_tensor()
            if tensor.dtype.name in FLOATS:
                numbers = self.writer.ir.tensor(_rounded(tensor.numpy(), dtype))
                node.attributes["value"] = self.writer.ir.AttrTensor("value", numbers)

    def inputs(self, node: onnx_ir.Node, dtype: onnx_ir.DataType) -> None:
        """Let an operator read its floating inputs in a dtype."""
        for index, value in enumerate(node.inputs):
            if value is not None and index not in OWN_INPUTS.get(node.op_type, ()):
                self._read(node, index, value, dtype)

    def kept(self, node: onnx_ir.Node) -> None:
        """Let an operator that was not named read what it read before."""
        for index, value in enumerate(node.inputs):
            before = self.before.get(value) if value is not None else None
            if value is not None and before is not None and node.op_type not in _FREE:
                self._read(node, index, value, before)

    def _read(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> None:
        if value.dtype is not None and value.dtype.name in FLOATS and value.dtype != dtype:
            node.replace_input_with(index, self._in(value, dtype))

    def _in(self, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        if (value, dtype) not in self.made:
            tensor = self.constants.get(value) if value.name not in self.swappable else None
            self.made[value, dtype] = self._cast(value, dtype) if tensor is None else self._stored(value, tensor, dtype)
        return self.made[value, dtype]

    def _stored(self, value: onnx_ir.Value, tensor: Any, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        graph: Any = value.graph
        numbers = _rounded(read_tensor(tensor), dtype)
        made = self.writer.constant(graph, numbers, f"{value.name}.{dtype.name.lower()}")
        made.dtype, made.shape = dtype, value.shape
        return made

    def finish(self) -> None:
        """Let a constant of another dtype have the name of the old one where nothing reads that any more."""
        for (value, _), made in self.made.items():
            graph = value.graph
            held = graph is not None and value.name in graph.initializers
            if graph is not None and held and value.producer() is None and not value.uses():
                name = str(value.name)
                graph.initializers.pop(name)
                graph.initializers.pop(made.name)  # type: ignore[arg-type]
                made.name = name
                made.const_value.name = name  # type: ignore[union-attr]
                graph.register_initializer(made)

    def _cast(self, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        graph: Any = value.graph
        place = value.producer() or graph
        made = self.writer.add(place, "Cast", value, dtype=dtype, to=dtype.value)
        made.shape = value.shape
        self.casts += 1
        return made


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    for graph in [model.graph, *model.graph.subgraphs()]:
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _rounded(numbers: np.ndarray, dtype: onnx_ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore"):  # who calls has looked at the range
        return np.asarray(numbers).astype(dtype.numpy())
