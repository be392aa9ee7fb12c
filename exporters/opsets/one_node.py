"""One node as a model of its own: what the onnx package can do with it, and the result in the node's place.

The version converter and the inliner of onnx take whole models below 2 GB without external data, and forget what their
own form of a graph does not hold (functions, metadata, names).  On one node, with only its small constants, none of
that matters, and what fails has a name.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir

_SMALL = 1024  # bytes of a constant that travels with its node: axes and sizes do, weights don't


def convert(node: onnx_ir.Node, opset: int, to: int) -> list[onnx_ir.Node]:
    """Let onnx.version_converter bring a node to another opset; returns what took its place, nothing if it stays.

    Raises:
        RuntimeError: the converter has no rule for it, or the older operator can't say it.
    """
    converter = require("onnx.version_converter", "onnx", "lower the opset of a model")
    proto = _model_of(node, opset)
    converted = converter.convert_version(proto, to)
    return [] if _same(proto, converted) else _put(node, converted)


def signature(node: onnx_ir.Node) -> tuple[Any, ...]:
    """What two nodes have in common that the converter leaves alone alike."""
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    attributes = tuple(ir.to_proto(one).SerializeToString() for one in node.attributes.values())
    kinds = tuple(str(value and value.type) for value in [*node.inputs, *node.outputs])
    return node.op_type, attributes, kinds


def inline(node: onnx_ir.Node, opset: int) -> bool:
    """Replace a node by the function that the standard defines it by in an opset; False if there is none."""
    inliner = require("onnx.inliner", "onnx", "lower the opset of a model")
    proto = _model_of(node, opset)
    _say_defaults(proto.graph.node[0], opset)
    written = inliner.inline_selected_functions(proto, [("", node.op_type)], inline_schema_functions=True)
    if any(one.op_type == node.op_type and not one.domain for one in written.graph.node):
        return False
    _put(node, _cleaned(written))
    return True


def _say_defaults(node: Any, opset: int) -> None:
    """A definition refers to attributes; the inliner leaves out those that are not there, with what they default to."""
    schema = require("onnx.defs", "onnx", "lower the opset of a model").get_schema(node.op_type, opset, "")
    given = {one.name for one in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.type:
            node.attribute.append(attribute.default_value)


def _model_of(node: onnx_ir.Node, opset: int) -> Any:
    """The node alone, as a ModelProto: its inputs are those of the graph, small constants are there as such."""
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    inputs: dict[onnx_ir.Value, onnx_ir.Value] = {}
    constants: list[onnx_ir.Value] = []
    for value in node.inputs:
        if value is None or value in inputs:
            continue
        inputs[value] = ir.Value(name=f"i{len(inputs)}", shape=value.shape, type=value.type)
        tensor = constant_of(value)
        if tensor is not None and tensor.nbytes <= _SMALL:
            inputs[value].const_value = ir.tensor(tensor.numpy(), name=inputs[value].name)
            constants.append(inputs[value])
    outputs = [
        ir.Value(name=f"o{index}" if value.name else "", shape=value.shape, type=value.type)
        for index, value in enumerate(node.outputs)
    ]
    alone = ir.Node(
        "", node.op_type, [value and inputs[value] for value in node.inputs], node.attributes.values(), outputs=outputs
    )
    graph = ir.Graph(
        [value for value in inputs.values() if value not in constants],
        [value for value in outputs if value.name],
        nodes=[alone],
        initializers=constants,
        opset_imports={"": opset},
        name="alone",
    )
    return ir.to_proto(ir.Model(graph, ir_version=10))


def constant_of(value: onnx_ir.Value) -> onnx_ir.TensorProtocol | None:
    """What a value always is: an initializer that no caller can replace, or what a Constant node gives."""
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    if value.is_graph_input():
        return None
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:
        return None


def _same(before: Any, after: Any) -> bool:
    if len(after.graph.node) != 1:
        return False
    old, new = before.graph.node[0], after.graph.node[0]
    attributes = [sorted(one.SerializeToString() for one in node.attribute) for node in (old, new)]
    return old.op_type == new.op_type and list(old.input) == list(new.input) and attributes[0] == attributes[1]


def _cleaned(proto: Any) -> Any:
    """Without what only a function needs: constants are cast and shapes are known, as far as the node's inputs are."""
    optimizer = require("onnxscript.optimizer", "onnx", "lower the opset of a model")
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]  # they warn of what they leave alone
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return optimizer.optimize(proto)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _put(node: onnx_ir.Node, proto: Any) -> list[onnx_ir.Node]:
    """The nodes of a model of `_model_of` in place of the node; returns them."""
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    shapes = require("onnx.shape_inference", "onnx", "lower the opset of a model")
    graph = ir.from_proto(shapes.infer_shapes(proto)).graph
    assert node.graph is not None
    ours = {f"i{index}": value for index, value in enumerate(dict.fromkeys(v for v in node.inputs if v is not None))}
    given = {value.name: value for value in [*graph.inputs, *graph.initializers.values()]}
    added = []
    for name, value in given.items():
        if name in ours:
            value.replace_all_uses_with(ours[name], replace_graph_outputs=True)
        elif value.uses():
            constant = ir.node("Constant", [], {"value": value.const_value})
            value.replace_all_uses_with(constant.outputs[0], replace_graph_outputs=True)
            added.append(constant)
    results = list(graph.outputs)
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    named = f"{node.outputs[0].name}_{node.op_type}"
    for index, one in enumerate([*added, *nodes]):
        one.name = f"{node.name}/{node.op_type}_{index}"
        for place, value in enumerate(one.outputs):
            value.name = value.name and f"{named}_{index}_{place}"
    node.graph.insert_before(node, [*added, *nodes])
    kept = [value for value in node.outputs if value.name]
    for old, new in zip(kept, results, strict=True):
        _take_place(ir, node, old, new)
    node.graph.remove(node, safe=True)
    return [*added, *nodes]


def _take_place(ir: Any, node: onnx_ir.Node, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """A new value for an old one; an output of the graph keeps its name."""
    if old.is_graph_output() and (new.producer() is None or new.is_graph_output() or new in node.inputs):
        same = ir.node("Identity", [new])
        node.graph.insert_before(node, same)  # type: ignore[union-attr]
        new = same.outputs[0]
    new.shape = old.shape or new.shape
    if old.dtype is not None:
        new.dtype = old.dtype
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
