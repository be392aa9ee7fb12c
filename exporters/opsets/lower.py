"""An ONNX model in an older opset, one opset after the other.

Each operator goes by the first way that holds:

    a rule of this project                        where onnx.version_converter has none or is wrong (opset_rules.py)
    onnx.version_converter, on the node alone     no limit of size, nothing forgotten, and what fails has a name
    the operator in float32, between two casts    where an older operator knows no bfloat16 or float16
    the standard's own definition of it           where the older opset has no such operator, or not all of it

Whatever was taken, the older opset's schema must take the result.  What nothing of this covers is an error with the
operator's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ExportError, require
from onelora_compile.exporters.opsets import one_node
from onelora_compile.exporters.opsets.rules import rule_of
from onelora_compile.exporters.opsets.schema import drop_defaults, schema_of, why_not
from onelora_compile.exporters.opsets.write_out import Before

if TYPE_CHECKING:
    import onnx_ir

_WIDER = {"BFLOAT16": "FLOAT", "FLOAT16": "FLOAT", "BOOL": "UINT8"}  # holds all values of the other


def lower_opset(model: onnx_ir.Model, opset: int) -> None:
    """Rewrite a model for an opset of 17 or newer that is older than its own, in place.

    Functions of the model are inlined.

    Raises:
        ExportError: an operator can't be expressed in that opset; names it.
    """
    now = model.opset_imports.get("") or 1
    if now <= opset:
        return
    newest = require("onnx.defs", "onnx", "lower the opset of a model").onnx_opset_version()
    if now > newest:
        raise ExportError(f"the model has opset {now}, of which this release of onnx knows nothing: update onnx")
    passes = require("onnx_ir.passes.common", "onnx", "lower the opset of a model")
    if model.functions:
        passes.InlinePass()(model)
    passes.ShapeInferencePass()(model)
    known: set[tuple[Any, ...]] = set()
    while now > opset:
        _step(model, now, opset, known)
        now -= 1
        model.opset_imports[""] = now
        model.graph.opset_imports[""] = now
    passes.NameFixPass()(model)  # what is written in the place of a node is named after it, each time it is rewritten


def _step(model: onnx_ir.Model, now: int, opset: int, known: set[tuple[Any, ...]]) -> None:
    """From one opset to the one before."""
    done: set[onnx_ir.Node] = set()
    # Again for the nodes of a definition that was put in: they are of the newer opset.
    while nodes := [node for node in model.graph.all_nodes() if node not in done]:
        done.update(nodes)
        for node in nodes:
            schema = None if node.domain else schema_of(node.op_type, now)
            if schema is not None and schema.since_version == now:
                done.update(_lower(node, now, opset, known))


def _lower(node: onnx_ir.Node, now: int, opset: int, known: set[tuple[Any, ...]]) -> list[onnx_ir.Node]:
    """Bring one node from an opset to the one before; returns nodes of that one that took its place, if any did."""
    older, reason = now - 1, None
    if (rule := rule_of(node.op_type, now)) is not None:
        rule(node)
        if node.graph is None:  # written out, in operators that both opsets have
            return []
    elif schema_of(node.op_type, older) is not None:
        made, reason = _converted(node, now, known)
        if made:
            return made
    if schema_of(node.op_type, older) is None:
        reason = f"is not in opset {older}"
    else:
        drop_defaults(node, older)
        reason = why_not(node, older) or reason
        if reason is None or _widened(node, older):
            return []
    try:
        inlined = one_node.inline(node, now)
    except RuntimeError as error:  # of onnx, where an optional input is left out before one that is given
        inlined, reason = False, f"{reason}, and its definition there can't be put in its place ({error})"
    if not inlined:
        raise ExportError(
            f"{node.op_type} {node.name!r} {reason}: export again with opset_version={opset} or lower, take a runtime "
            f"that knows opset {now}, or change that part of the model"
        )
    return []


def _converted(node: onnx_ir.Node, now: int, known: set[tuple[Any, ...]]) -> tuple[list[onnx_ir.Node], str | None]:
    """What onnx.version_converter makes of a node, nothing if it leaves it alone; or why it does not take it."""
    signature = (now, *one_node.signature(node))
    if signature in known:
        return [], None
    try:
        made = one_node.convert(node, now, now - 1)
    except RuntimeError as error:
        return [], f"can't become one of opset {now - 1} ({str(error).rsplit('failed: ')[-1].strip()})"
    if not made:
        known.add(signature)
    return made, None


def _widened(node: onnx_ir.Node, older: int) -> bool:
    """Compute a node in a wider dtype, between casts, if that is all that an older opset needs."""
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    if any(name in node.attributes for name in ("dtype", "to", "value")):  # says its output's dtype itself
        return False
    for name, wider in _WIDER.items():
        narrow, wide = ir.DataType[name], ir.DataType[wider]
        if why_not(node, older, {narrow: wide}) is None:
            _put_casts(node, narrow, wide)
            return True
    return False


def _put_casts(node: onnx_ir.Node, narrow: Any, wide: Any) -> None:
    ir, made = require("onnx_ir", "onnx", "lower the opset of a model"), Before(node)
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == narrow:
            node.replace_input_with(index, made.cast(value, wide))
    for value in [one for one in node.outputs if one.dtype == narrow]:
        back = ir.node("Cast", [value], {"to": narrow.value})
        node.graph.insert_after(node, back)  # type: ignore[union-attr]
        result = back.outputs[0]
        result.dtype, result.shape, result.name = narrow, value.shape, f"{value.name}_narrow"
        if value.is_graph_output():
            result.name, value.name = value.name, f"{value.name}_wide"
        value.replace_all_uses_with(result, replace_graph_outputs=True)
        back.replace_input_with(0, value)
        value.dtype = wide
