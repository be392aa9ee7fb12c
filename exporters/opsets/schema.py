"""Whether an operator's schema in some opset can take a node: its attributes, their values, its inputs, its types."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir

# Values of attributes that came later than the attribute: a schema tells the one, but not the other.
_NEWER: dict[tuple[str, str], dict[str, int]] = {
    ("GridSample", "mode"): {"linear": 20, "cubic": 20},
    ("Pad", "mode"): {"wrap": 19},
    ("Resize", "coordinate_transformation_mode"): {"half_pixel_symmetric": 19},
    ("ScatterElements", "reduction"): {"max": 18, "min": 18},
    ("ScatterND", "reduction"): {"max": 18, "min": 18},
}
_ONLY_TINY_FLOATS = ("saturate", "round_mode")  # say how to cast to a float8: no such cast, no such question


@functools.cache
def schema_of(op_type: str, opset: int) -> Any:
    """The schema that an operator has in an opset, None if it has none."""
    defs = require("onnx.defs", "onnx", "lower the opset of a model")
    try:
        return defs.get_schema(op_type, opset, "")
    except defs.SchemaError:
        return None


def why_not(node: onnx_ir.Node, opset: int, instead: dict[Any, Any] | None = None) -> str | None:
    """What an opset that has the operator does not have of a node, also if some dtypes were others; None if nothing."""
    return next(_reasons(node, opset, instead or {}), None)


def drop_defaults(node: onnx_ir.Node, opset: int) -> None:
    """Take off the attributes that an opset does not have, where they say what it means without them."""
    schema, newer = schema_of(node.op_type, opset), schema_of(node.op_type, opset + 1)
    for name in [name for name in node.attributes if name not in schema.attributes]:
        if name in _ONLY_TINY_FLOATS or _says_nothing(node.attributes[name], newer):
            node.attributes.pop(name)
    while node.inputs and node.inputs[-1] is None and len(node.inputs) > schema.max_input:
        node.resize_inputs(len(node.inputs) - 1)


def _says_nothing(attribute: Any, newer: Any) -> bool:
    """Whether an attribute has its default, or for a list the value that changes nothing."""
    if attribute.name == "dilations":
        return all(size == 1 for size in attribute.as_ints())
    known = newer.attributes.get(attribute.name)
    if known is None or not known.default_value.type:
        return False
    helper = require("onnx.helper", "onnx", "lower the opset of a model")
    proto = require("onnx_ir", "onnx", "lower the opset of a model").to_proto(attribute)
    return bool(helper.get_attribute_value(proto) == helper.get_attribute_value(known.default_value))


def _reasons(node: onnx_ir.Node, opset: int, instead: dict[Any, Any]) -> Iterator[str]:
    schema = schema_of(node.op_type, opset)
    for name, attribute in node.attributes.items():
        if name not in schema.attributes:
            yield f"uses {name!r}, which opset {opset} does not have"
        elif attribute.type.name == "STRING":
            since = _NEWER.get((node.op_type, name), {}).get(attribute.as_string(), 0)
            if since > opset:
                yield f"has {name}={attribute.as_string()!r}, which opset {opset} does not have"
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if given > schema.max_input:
        yield f"has {given} inputs, in opset {opset} at most {schema.max_input}"
    yield from _type_reasons(node, schema, opset, instead)


def _type_reasons(node: onnx_ir.Node, schema: Any, opset: int, instead: dict[Any, Any]) -> Iterator[str]:
    allowed = {one.type_param_str: set(one.allowed_type_strs) for one in schema.type_constraints}
    bound: dict[str, str] = {}
    for formals, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, value in enumerate(values):
            if value is None or not _known(value.type) or not formals:
                continue
            formal = formals[min(index, len(formals) - 1)]
            found = type_text(value.type, instead)
            if found not in allowed.get(formal.type_str, {formal.type_str}):
                yield f"works on {found}, which opset {opset} has no {node.op_type} for"
            elif formal.is_homogeneous and bound.setdefault(formal.type_str, found) != found:
                yield f"works on {formal.type_str} of different types, which opset {opset} does not take"


def _known(kind: Any) -> bool:
    """Whether a type says what its elements are."""
    return kind is not None and kind.dtype is not None and kind.dtype.value != 0


def type_text(kind: Any, instead: dict[Any, Any]) -> str:
    """A type as schemas write it, "tensor(float16)" or "seq(tensor(int64))", with other dtypes for some."""
    name = type(kind).__name__
    if name in ("SequenceType", "OptionalType"):
        return f"{'seq' if name == 'SequenceType' else 'optional'}({type_text(kind.elem_type, instead)})"
    element = instead.get(kind.dtype, kind.dtype).name.lower()
    return f"{'sparse_tensor' if name == 'SparseTensorType' else 'tensor'}({element})"
