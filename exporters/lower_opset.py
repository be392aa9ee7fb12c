"""An ONNX model in an older opset: what onnx.version_converter has no rules for (Split, Gelu, reductions of opset 18).

    Split(x, num_outputs=n)     -> Split(x, sizes)
    ReduceMean(x, axes)         -> ReduceMean(x){axes}        and its siblings
    Gelu(x)                     -> its definition in the standard
    LayerNormalization(x, …)    -> its definition in the standard, for parsers without it
    any new attribute           -> dropped if it has its default value

What none of this covers, and the older operator could not mean, is an error with the operator's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, require

if TYPE_CHECKING:
    import onnx_ir

_RENAMED = {"linear": "bilinear", "cubic": "bicubic"}  # modes of GridSample, since opset 20


def lower_opset(model: onnx_ir.Model, opset: int) -> None:
    """Rewrite a model for an opset of 17 or newer that is older than its own, in place.

    Raises:
        ExportError: an operator can't be expressed in that opset; names it.
    """
    for node in list(model.graph.all_nodes()):
        _rule(node)(node)
    for node in model.graph.all_nodes():
        _fit_attributes(node, opset)
    model.opset_imports[""] = opset


def write_out_norms(model: onnx_ir.Model) -> int:
    """Replace every LayerNormalization by its definition; returns how many there were."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "LayerNormalization"]
    for node in nodes:
        _write_out_norm(node, (model.opset_imports.get("") or 1) >= 18)
    return len(nodes)


def _rule(node: onnx_ir.Node) -> Callable[[onnx_ir.Node], None]:
    if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
        return _axes_as_attribute
    return {"Split": _sizes_as_input, "Gelu": _write_out_gelu, "GridSample": _rename_mode}.get(node.op_type, _nothing)


def _nothing(node: onnx_ir.Node) -> None:
    pass


def _fit_attributes(node: onnx_ir.Node, opset: int) -> None:
    """Drop attributes that are new and say what was meant before; refuse the others, and inputs that are new."""
    defs = require("onnx.defs", "onnx", "lower the opset of a model")
    try:
        schema = defs.get_schema(node.op_type, opset, "")
    except Exception as error:  # onnx.defs.SchemaError, which is not public in every release
        raise ExportError(
            f"{node.op_type} is not in opset {opset}: export again with a lower opset_version, or change that part of "
            "the model"
        ) from error
    newest = defs.get_schema(node.op_type, "")
    for name in [name for name in node.attributes if name not in schema.attributes]:
        default = newest.attributes[name].default_value if name in newest.attributes else None
        proto = require("onnx_ir", "onnx", "lower the opset of a model").to_proto(node.attributes[name])
        helper = require("onnx.helper", "onnx", "lower the opset of a model")
        known = default is not None and default.type and helper.get_attribute_value(default)
        if known is None or helper.get_attribute_value(proto) != known:
            raise ExportError(f"{node.op_type} {node.name!r} uses {name!r}, which opset {opset} does not have")
        node.attributes.pop(name)
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if given > schema.max_input:
        raise ExportError(
            f"{node.op_type} {node.name!r} has {given} inputs, in opset {opset} at most {schema.max_input}"
        )


def _sizes_as_input(node: onnx_ir.Node) -> None:
    if "num_outputs" not in node.attributes:
        return
    count = node.attributes.pop("num_outputs").as_int()
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    x = node.inputs[0]
    size = None if x is None or x.shape is None else x.shape[axis]
    if not isinstance(size, int):
        raise ExportError(
            f"Split {node.name!r} divides an axis of unknown size, which opset 17 has no form for: give torch.split "
            "sizes"
        )
    each = -(-size // count)
    sizes = [each] * (count - 1) + [size - each * (count - 1)]
    made = _Before(node)
    constant = made.constant(np.array(sizes, np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, constant)


def _axes_as_attribute(node: onnx_ir.Node) -> None:
    if "noop_with_empty_axes" in node.attributes:
        noop = node.attributes.pop("noop_with_empty_axes").as_int()
        if noop and (len(node.inputs) < 2 or node.inputs[1] is None):
            raise ExportError(f"{node.op_type} {node.name!r} reduces nothing, which opset 17 has no form for")
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return
    axes = node.inputs[1].const_value
    if axes is None and (producer := node.inputs[1].producer()) is not None and producer.op_type == "Constant":
        axes = producer.attributes["value"].as_tensor() if "value" in producer.attributes else None
    if axes is None:
        raise ExportError(f"{node.op_type} {node.name!r} computes its axes, which opset 17 has no form for")
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.numpy().flatten()])
    node.resize_inputs(1)


def _rename_mode(node: onnx_ir.Node) -> None:
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    if "mode" in node.attributes and (mode := node.attributes["mode"].as_string()) in _RENAMED:
        node.attributes["mode"] = ir.AttrString("mode", _RENAMED[mode])


class _Before:
    """Makes nodes before one, and puts the last in its place."""

    def __init__(self, node: onnx_ir.Node) -> None:
        assert node.graph is not None
        self.ir = require("onnx_ir", "onnx", "lower the opset of a model")
        self.node, self.graph, self.made = node, node.graph, 0

    def add(self, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        new = self.ir.node(op_type, list(inputs), attributes or None)
        new.outputs[0].name = f"{self.node.outputs[0].name}_lowered{self.made}"
        self.made += 1
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def constant(self, array: np.ndarray) -> Any:
        return self.add("Constant", value=self.ir.tensor(array))

    def replace_with(self, value: Any) -> None:
        old = self.node.outputs[0]
        value.dtype, value.shape = old.dtype, old.shape
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}_replaced"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)


def _write_out_gelu(node: onnx_ir.Node) -> None:
    """0.5 x (1 + erf(x / sqrt 2)), or with tanh for erf where the attribute says so; in the dtype of x."""
    made, x = _Before(node), node.inputs[0]
    if x is None or x.dtype is None:
        raise ExportError(f"Gelu {node.name!r} can't be written out: the dtype of its input is not known")
    dtype = x.dtype.numpy()

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


def _write_out_norm(node: onnx_ir.Node, modern: bool) -> None:
    """(x - mean) / sqrt(variance + epsilon) in float32, as the operator's stash_type has it, times scale plus bias."""
    x, scale, *rest = node.inputs
    if x is None or x.shape is None or x.dtype is None or scale is None or len(node.outputs) > 1:
        raise ExportError(
            f"LayerNormalization {node.name!r} can't be written out: the shape or dtype of its input is not known, or "
            "its mean is used too. TensorRT 8.5 has no such operator: write the norm with mean and var in the model"
        )
    made = _Before(node)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    axes = list(range(axis % len(x.shape), len(x.shape)))
    # In opset 18 the axes of ReduceMean are an input, before an attribute.
    numbers = (made.constant(np.array(axes, np.int64)),) if modern else ()
    attributes: dict[str, Any] = {"keepdims": 1} if modern else {"keepdims": 1, "axes": axes}
    float32 = made.ir.DataType.FLOAT
    wide = x if x.dtype == float32 else made.add("Cast", x, to=float32.value)
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
