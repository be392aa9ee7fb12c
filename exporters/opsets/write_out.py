"""Operators of ONNX by simpler ones, for an older opset or a parser without them.

Gelu(x)                          its definition in the standard
LayerNormalization(x, s, b)      its definition, in float32 as stash_type has it
RMSNormalization(x, s)           its definition, in float32 as stash_type has it
GroupNormalization(x, s, b)      InstanceNormalization of the groups, then scale and bias
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, require

if TYPE_CHECKING:
    import onnx_ir


class Before:
    """Makes nodes before one, and puts the last in its place."""

    def __init__(self, node: onnx_ir.Node) -> None:
        assert node.graph is not None
        self.ir = require("onnx_ir", "onnx", "lower the opset of a model")
        self.node, self.graph, self.made = node, node.graph, 0

    def add(self, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        """The output of a new node."""
        new = self.ir.node(op_type, list(inputs), attributes or None)
        new.outputs[0].name = f"{self.node.outputs[0].name}_{op_type}_{self.made}"
        self.made += 1
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def constant(self, array: np.ndarray) -> Any:
        """An array as the output of a Constant node."""
        value = self.add("Constant", value=self.ir.tensor(array))
        value.dtype, value.shape = self.ir.DataType.from_numpy(array.dtype), self.ir.Shape(array.shape)
        return value

    def cast(self, value: Any, dtype: Any) -> Any:
        """The value in a dtype of onnx_ir; itself if it is of it."""
        if value.dtype == dtype:
            return value
        made = self.add("Cast", value, to=dtype.value)
        made.dtype, made.shape = dtype, value.shape
        return made

    def replace_with(self, value: Any) -> None:
        """Take the node away; everything that read its output reads the value, which takes a graph output's name."""
        old = self.node.outputs[0]
        value.dtype, value.shape = old.dtype, old.shape
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}_replaced"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)


def write_out_norms(model: onnx_ir.Model) -> int:
    """Replace every LayerNormalization by its definition; returns how many there were."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "LayerNormalization"]
    for node in nodes:
        _write_out_layer_norm(node, (model.opset_imports.get("") or 1) >= 18)
    return len(nodes)


def write_out_gelu(node: onnx_ir.Node) -> None:
    """0.5 x (1 + erf(x / sqrt 2)), or with tanh for erf where the attribute says so; in the dtype of x.

    Leaves it alone where that is not known.
    """
    made, x = Before(node), node.inputs[0]
    known = node.outputs[0].dtype or (x.dtype if x is not None else None)
    if known is None:
        return
    dtype = known.numpy()

    def number(value: float) -> Any:
        return made.constant(np.array(value, dtype))

    tanh = "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"
    if tanh:
        cube = made.add("Mul", made.add("Mul", x, x), x)
        inner = made.add("Add", x, made.add("Mul", cube, number(0.044715)))
        bent = made.add("Tanh", made.add("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        bent = made.add("Erf", made.add("Mul", x, number(math.sqrt(0.5))))
    made.replace_with(made.add("Mul", made.add("Mul", x, number(0.5)), made.add("Add", bent, number(1.0))))


def write_out_rms_norm(node: onnx_ir.Node) -> None:
    """X / sqrt(mean(x²) + epsilon) in float32, as stash_type has it, times scale; in operators of opset 18 and newer.

    Leaves it alone where the rank of x is not known.
    """
    x, scale, *_ = node.inputs
    if x is None or x.shape is None or x.dtype is None or scale is None:
        return
    made = Before(node)
    axis, epsilon = _number(node, "axis", -1), _number(node, "epsilon", 1e-5)
    stash = made.ir.DataType(_number(node, "stash_type", 1))
    axes = made.constant(np.arange(axis % len(x.shape), len(x.shape), dtype=np.int64))
    wide = made.cast(x, stash)
    mean = made.add("ReduceMean", made.add("Mul", wide, wide), axes, keepdims=1)
    mean.dtype = stash
    deviation = made.add("Sqrt", made.add("Add", mean, made.constant(np.array(epsilon, stash.numpy()))))
    normal = made.add("Div", wide, deviation)
    normal.dtype = stash
    made.replace_with(made.add("Mul", made.cast(normal, scale.dtype or x.dtype), scale))


def write_out_group_norm(node: onnx_ir.Node) -> None:
    """The form of opset 21, with a scale and bias for each channel: the groups as instances, then scale and bias."""
    x, scale, bias = node.inputs[:3]
    if x is None or x.shape is None or x.dtype is None or scale is None or bias is None:
        raise ExportError(f"GroupNormalization {node.name!r} can't be written out: the shape of its input is not known")
    made = Before(node)
    groups, epsilon = _number(node, "num_groups", 1), _number(node, "epsilon", 1e-5)
    stash = made.ir.DataType(_number(node, "stash_type", 1))
    grouped = made.add("Reshape", made.cast(x, stash), made.constant(np.array([0, groups, -1], np.int64)))
    ones, zeros = (made.constant(np.full(groups, value, stash.numpy())) for value in (1, 0))
    normal = made.add("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    normal = made.add("Reshape", normal, made.add("Shape", x))
    normal.dtype = stash
    channels = made.constant(np.array([-1, *[1] * (len(x.shape) - 2)], np.int64))
    scaled = made.add("Mul", made.cast(normal, x.dtype), made.add("Reshape", scale, channels))
    made.replace_with(made.add("Add", scaled, made.add("Reshape", bias, channels)))


def _number(node: onnx_ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _write_out_layer_norm(node: onnx_ir.Node, modern: bool) -> None:
    """(x - mean) / sqrt(variance + epsilon) in float32, as the operator's stash_type has it, times scale plus bias."""
    x, scale, *rest = node.inputs
    if x is None or x.shape is None or x.dtype is None or scale is None or len(node.outputs) > 1:
        raise ExportError(
            f"LayerNormalization {node.name!r} can't be written out: the shape or dtype of its input is not known, or "
            "its mean is used too. TensorRT 8.5 has no such operator: write the norm with mean and var in the model"
        )
    made = Before(node)
    axis, epsilon = _number(node, "axis", -1), _number(node, "epsilon", 1e-5)
    axes = list(range(axis % len(x.shape), len(x.shape)))
    # In opset 18 the axes of ReduceMean are an input, before an attribute.
    numbers = (made.constant(np.array(axes, np.int64)),) if modern else ()
    attributes: dict[str, Any] = {"keepdims": 1} if modern else {"keepdims": 1, "axes": axes}
    float32 = made.ir.DataType.FLOAT
    wide = made.cast(x, float32)
    centred = made.add("Sub", wide, made.add("ReduceMean", wide, *numbers, **attributes))
    variance = made.add("ReduceMean", made.add("Mul", centred, centred), *numbers, **attributes)
    deviation = made.add("Sqrt", made.add("Add", variance, made.constant(np.array(epsilon, np.float32))))
    normal = made.add("Div", centred, deviation)
    if x.dtype != float32:
        normal = made.add("Cast", normal, to=x.dtype.value)
    result = made.add("Mul", normal, scale)
    if rest and rest[0] is not None:
        result = made.add("Add", result, rest[0])
    made.replace_with(result)
