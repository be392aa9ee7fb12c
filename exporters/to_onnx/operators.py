"""The project's operators in ONNX: how torch.onnx writes them, and what standard operators become of them.

    onelora::Vector(b) {name}        marks a vector; replaced by what the mode gives in its place
    onelora::FeatureSum(x)           ReduceSum over the last axis, in float32
    onelora::AddRank1(y, s, b)       y + Cast(s * b)
    onelora::AdaptedWeight(W, b)     W + Unsqueeze(b), in float32 with one rounding

While the model is converted they are opaque, so that the exporter's optimizer neither folds nor merges a vector; no
finished model holds one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from onelora_compile import ops
from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "onelora"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


@functools.cache
def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    onnx = require("onnx", "onnx", "export to ONNX")
    onnxscript = require("onnxscript", "onnx", "export to ONNX")
    for schema in _schemas(onnx.defs):
        onnx.defs.register_schema(schema)
    op = onnxscript.values.Opset(DOMAIN, 1)

    def vector(value, name: str):  # type: ignore[no-untyped-def]  # annotations would be read as ONNX types
        return op.Vector(value, name=name)

    def feature_sum(x):  # type: ignore[no-untyped-def]
        return op.FeatureSum(x)

    def add_rank1(y, s, vector):  # type: ignore[no-untyped-def]
        return op.AddRank1(y, s, vector)

    def adapted_weight(weight, vector, dims: Sequence[int]):  # type: ignore[no-untyped-def]
        return op.AdaptedWeight(weight, vector, dims=dims)

    return {
        ops.VECTOR: vector,
        ops.FEATURE_SUM: feature_sum,
        ops.ADD_RANK1: add_rank1,
        ops.ADAPTED_WEIGHT: adapted_weight,
    }


def _schemas(defs: Any) -> list[Any]:
    parameter, kinds = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType

    def schema(op_type: str, inputs: str, **attributes: Any) -> Any:
        return defs.OpSchema(
            op_type,
            DOMAIN,
            1,
            inputs=[parameter(one, f"T{index}") for index, one in enumerate(inputs.split())],
            outputs=[parameter("out", "S" if op_type == "FeatureSum" else "T0")],
            type_constraints=[(f"T{index}", _FLOATS, "") for index in range(len(inputs.split()))]
            + [("S", ["tensor(float)", "tensor(double)"], "")][: op_type == "FeatureSum"],
            attributes=[defs.OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
        )

    return [
        schema("Vector", "value", name=kinds.STRING),
        schema("FeatureSum", "x"),
        schema("AddRank1", "y s vector"),
        schema("AdaptedWeight", "weight vector", dims=kinds.INTS),
    ]


class OperatorWriter:
    """Writes standard operators in the place of ours, in one graph; `constant` makes shared small constants."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.ir = require("onnx_ir", "onnx", "export to ONNX")
        self.graph = graph
        self.constants: dict[tuple[int, ...], onnx_ir.Value] = {}

    def finish(self) -> None:
        """Replace what is left of the operators, Vector excepted, and give outputs the names that the base's have."""
        for node in list(self.graph.all_nodes()):
            if node.domain == DOMAIN and node.op_type in _WRITTEN:
                new = _WRITTEN[node.op_type](self, node)
                self.replace(node, new)

    def add(self, before: onnx_ir.Node, op_type: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        """A standard operator's output; the operator is put before a node."""
        node = self.ir.node(op_type, list(inputs), attributes or None)
        assert before.graph is not None
        before.graph.insert_before(before, node)
        value: onnx_ir.Value = node.outputs[0]
        return value

    def cast(self, before: onnx_ir.Node, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        """The value in a dtype."""
        if value.dtype == dtype:
            return value
        new = self.add(before, "Cast", value, to=dtype.value)
        new.dtype, new.shape = dtype, value.shape
        return new

    def constant(self, *numbers: int) -> onnx_ir.Value:
        """An int64 tensor as an initializer."""
        if numbers not in self.constants:
            name = "onelora_" + "_".join(str(number).replace("-", "m") for number in numbers)
            tensor = self.ir.tensor(list(numbers), dtype=self.ir.DataType.INT64, name=name)
            self.constants[numbers] = self.initializer(name, tensor)
        return self.constants[numbers]

    def initializer(self, name: str, tensor: Any) -> onnx_ir.Value:
        """A named constant of the main graph."""
        value: onnx_ir.Value = self.ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def typed(self, value: onnx_ir.Value, like: onnx_ir.Value) -> onnx_ir.Value:
        """The value with the dtype of another one."""
        assert like.dtype is not None
        value.dtype = like.dtype
        return value

    def replace(self, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
        """Put a value in the place of a node's output; an output of the graph keeps the base's name."""
        (old,) = node.outputs
        assert node.graph is not None
        self.typed(value, old).shape = old.shape
        if old.is_graph_output():
            # The base's output is what the update is added to; without one it is called as the operator's was.
            base = node.inputs[0] if node.op_type == "AddRank1" else None
            own = base if base is not None and base.producer() is not None and not base.is_graph_output() else old
            value.name, own.name = own.name, f"{own.name}_replaced"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)


def _feature_sum(writer: OperatorWriter, node: onnx_ir.Node) -> onnx_ir.Value:
    (x,) = node.inputs
    assert x is not None
    wide = writer.cast(node, x, _accumulation(writer, x))
    writer.typed(node.outputs[0], wide)
    return writer.add(node, "ReduceSum", wide, writer.constant(-1), keepdims=1)


def _add_rank1(writer: OperatorWriter, node: onnx_ir.Node) -> onnx_ir.Value:
    y, s, vector = node.inputs
    assert y is not None
    assert s is not None
    assert vector is not None
    wide = writer.cast(node, vector, _accumulation(writer, y))
    update = writer.typed(writer.add(node, "Mul", s, wide), wide)
    assert y.dtype is not None
    return writer.add(node, "Add", y, writer.cast(node, update, y.dtype))


def _adapted_weight(writer: OperatorWriter, node: onnx_ir.Node) -> onnx_ir.Value:
    weight, vector = node.inputs
    assert weight is not None
    assert vector is not None
    dtype = _accumulation(writer, weight)
    axes = writer.constant(*sorted(node.attributes["dims"].as_ints()))
    update = writer.add(node, "Unsqueeze", writer.cast(node, vector, dtype), axes)
    total = writer.add(node, "Add", writer.cast(node, weight, dtype), update)
    total.dtype = dtype
    assert weight.dtype is not None
    return writer.cast(node, total, weight.dtype)


def _accumulation(writer: OperatorWriter, value: onnx_ir.Value) -> onnx_ir.DataType:
    kinds = writer.ir.DataType
    dtype: onnx_ir.DataType = kinds.DOUBLE if value.dtype == kinds.DOUBLE else kinds.FLOAT
    return dtype


_WRITTEN: dict[str, Callable[[OperatorWriter, onnx_ir.Node], onnx_ir.Value]] = {
    "FeatureSum": _feature_sum,
    "AddRank1": _add_rank1,
    "AdaptedWeight": _adapted_weight,
}
