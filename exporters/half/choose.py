"""Which operators of a model stay in float32 when the rest becomes float16, and why each.

1. Softmax, sums, means and norms without float32 inside; squares that are reduced, up to what they divide.
2. What reads or makes a value beyond float16, or so small that its largest number loses bits, with a margin of 8:
   inputs that nobody measured may be larger.
3. What reads a vector: the update is rounded once, where it is added.
4. What has no float16 in its opset, or a body.
5. What reads a constant that float16 makes zero or infinite: `lost.py`.
6. What only moves numbers between operators that stay: two casts less.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ConfigError, require
from onelora_compile.exporters.half.lost import MOVES, lost_constants
from onelora_compile.exporters.half.norms import half_norms
from onelora_compile.exporters.half.ranges import LARGEST, NORMAL, STORED, TensorRange
from onelora_compile.exporters.half.retype import FLOATS, OWN_INPUTS
from onelora_compile.exporters.opsets.schema import schema_of, why_not
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir

AUTO = "auto"
MARGIN = 8.0
_REDUCING = frozenset(
    "Softmax LogSoftmax ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp ReduceProd "
    "CumSum InstanceNormalization LpNormalization MeanVarianceNormalization".split()
)
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
READS_VECTOR = "reading a vector"

KeptNodes = dict["onnx_ir.Node", str]


def kept_float32(
    model: onnx_ir.Model,
    ranges: Mapping[str, TensorRange],
    asked: str | Sequence[str],
    vectors: Collection[str] = (),
    trained: Collection[str] = (),
) -> KeptNodes:
    """The operators of the main graph that stay, with the reason of each.

    Args:
        model: in float32, its dtypes known.
        ranges: of its values, where `asked` has "auto".
        asked: "auto", names of operators or of what they make, with `*` for any part, or several.
        vectors: initializers that adapters replace, and what stands for them.
        trained: other initializers that they replace.

    Raises:
        ConfigError: a name that the model does not have.
    """
    wanted = [asked] if isinstance(asked, str) else list(asked)
    kept = lost_constants(model, {*vectors, *trained}) | _impossible(model) | _reading(model, vectors)
    if AUTO in wanted:
        kept = _reduced(model) | _out_of_range(model, ranges) | kept
    for one in [one for one in wanted if one != AUTO]:
        kept |= _named(model, one)
    if AUTO in wanted:
        _fill(model, kept)
    return kept


def floats(values: Sequence[onnx_ir.Value | None]) -> list[onnx_ir.Value]:
    """Those of some values that are floating."""
    return [value for value in values if value is not None and value.dtype is not None and value.dtype.name in FLOATS]


def why_out(found: TensorRange | None) -> str:
    """Why float16 is not for a value; "" where it is."""
    if found is None:
        return ""
    if found.largest > LARGEST / MARGIN:
        return f"{found.name} is up to {found.largest:.2g}"
    if 0 < found.largest < NORMAL * (1 if found.op == STORED else MARGIN):
        return f"{found.name} is at most {found.largest:.2g}"
    return ""


def _out_of_range(model: onnx_ir.Model, ranges: Mapping[str, TensorRange]) -> KeptNodes:
    found = {}
    for node in model.graph:
        read = [one for index, one in enumerate(node.inputs) if not _is_added(node, index, ranges)]
        reasons = [why_out(ranges.get(str(value.name))) for value in floats([*read, *node.outputs])]
        if reason := next(filter(None, reasons), ""):
            found[node] = reason
    return found


def _is_added(node: onnx_ir.Node, index: int, ranges: Mapping[str, TensorRange]) -> bool:
    """Whether an input is a small summand or bias: what float16 loses of it is small beside what it is added to.

    Not a single number, as the one that keeps a norm from dividing by zero.
    """
    value = node.inputs[index]
    found = ranges.get(str(value.name)) if value is not None else None
    if value is None or found is None or found.largest >= NORMAL * MARGIN:
        return False
    single = value.const_value is not None and value.const_value.size == 1
    return not single and (index >= 2 or node.op_type in ("Add", "Sub"))


def _reduced(model: onnx_ir.Model) -> KeptNodes:
    found = {node: f"{node.op_type} sums" for node in model.graph if node.op_type in _REDUCING}
    for norm in half_norms(model, also_float32=True):
        found |= dict.fromkeys(norm.inside, "of a norm that is written out")
    return {node: reason for node, reason in found.items() if node.graph is model.graph}


def _impossible(model: onnx_ir.Model) -> KeptNodes:
    kinds: Any = require("onnx_ir", "onnx", "convert a model").DataType
    opset, found = model.opset_imports.get("") or 1, {}
    for node in model.graph:
        known = not node.domain and schema_of(node.op_type, opset) is not None
        if any(one.type.name in ("GRAPH", "GRAPHS") for one in node.attributes.values()):
            found[node] = "it has a body"
        elif not known or node.op_type in _QUANTIZERS:
            found[node] = f"{node.op_type} has dtypes of its own"
        elif node.op_type not in OWN_INPUTS and _is_float32_alone(node, opset, kinds):
            found[node] = f"{node.op_type} has no float16 in opset {opset}"
    return found


def _is_float32_alone(node: onnx_ir.Node, opset: int, kinds: Any) -> bool:
    return why_not(node, opset, {kinds.FLOAT: kinds.FLOAT16}) is not None and why_not(node, opset) is None


def _reading(model: onnx_ir.Model, vectors: Collection[str]) -> KeptNodes:
    """What reads a vector, or a row of its table, up to the first operator that computes with it."""
    found: KeptNodes = {}
    values = [value for value in model.graph.initializers.values() if value.name in vectors]
    while values:
        for use in values.pop().uses():
            if use.node.graph is model.graph and use.node not in found:
                found[use.node] = READS_VECTOR
                if use.node.op_type in MOVES:
                    values += use.node.outputs
    return found


def _named(model: onnx_ir.Model, name: str) -> KeptNodes:
    def fits(node: onnx_ir.Node) -> bool:
        names = [node.name, *(value.name for value in node.outputs)]
        return any(fnmatch.fnmatchcase(one, name) for one in names if one)

    if not (found := [node for node in model.graph if fits(node)]):
        known = (str(value.name) for node in model.graph for value in node.outputs)
        raise ConfigError(f"keep_float32: {name!r} is no operator of the model and no value; it has {shortened(known)}")
    return dict.fromkeys(found, "named by keep_float32")


def _fill(model: onnx_ir.Model, kept: KeptNodes) -> None:
    """Keep what only moves numbers from operators that stay to operators that stay."""
    changed = True
    while changed:
        changed = False
        for node in model.graph:
            if node in kept or node.op_type not in MOVES or not floats(node.outputs):
                continue
            before = [value.producer() for value in floats(node.inputs) if value.producer() is not None]
            after = [use.node for value in node.outputs for use in value.uses()]
            if before and after and all(one in kept for one in [*before, *after]):
                kept[node], changed = "between two that stay", True
