"""A model of float32 in float16, but for the operators that stay."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import require
from onelora_compile.exporters.half.choose import AUTO, READS_VECTOR, KeptNodes, floats, kept_float32, why_out
from onelora_compile.exporters.half.lost import LOST
from onelora_compile.exporters.half.ranges import TensorRange
from onelora_compile.exporters.half.retype import retype
from onelora_compile.exporters.onnx_file.load import read_tensor
from onelora_compile.exporters.onnx_file.node_writer import Writer

if TYPE_CHECKING:
    import onnx_ir

Ranges = Mapping[str, TensorRange]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """What stays in float32 of a model whose rest is float16.

    Attributes:
        operators: those that stay, with the reason of each, by the name of what they make.
        of: how many operators compute with floating numbers.
        casts: between the two, of values that are computed.
    """

    operators: dict[str, str]
    of: int
    casts: int

    def __str__(self) -> str:
        reasons = Counter(_kind(reason) for reason in self.operators.values())
        named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        return f"{len(self.operators)} of {self.of} operators in float32 ({named}), {self.casts} casts"


def to_float16(
    model: onnx_ir.Model,
    asked: str | Sequence[str],
    measured: Callable[[], Ranges],
    vectors: Collection[str] = (),
    trained: Collection[str] = (),
) -> Mixed:
    """Convert a model, in place.

    Inputs and outputs become float16 too, where float16 holds them.

    Args:
        model: in float32.
        asked: see `kept_float32`.
        measured: the ranges of its values; called where they are asked for.
        vectors: initializers, or tables, of what adapters add: they stay in float32, and so does what reads them.
        trained: the same of heads and norms: they stay in float32, and are cast where they are read.
    """
    ir: Any = require("onnx_ir", "onnx", "convert a model to float16")
    passes = require("onnx_ir.passes.common", "onnx", "convert a model to float16")
    passes.ShapeInferencePass()(model)
    auto = AUTO in ([asked] if isinstance(asked, str) else asked)
    ranges = measured() if auto else {}
    vectors, trained = (_held(model, names) for names in (vectors, trained))
    kept = kept_float32(model, ranges, asked, vectors, trained)
    own = [value for value in floats(model.graph.inputs) if value.name not in vectors | trained]
    for value in own:
        if not why_out(ranges.get(str(value.name))):
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    _halve_summands(model, kept, ranges, vectors | trained)
    computing = [node for node in model.graph if floats(node.outputs) or floats(node.inputs)]
    wanted = {node: ir.DataType.FLOAT if node in kept else ir.DataType.FLOAT16 for node in computing}
    for node in computing:
        if node.op_type == "Attention" and node not in kept:  # its softmax is inside
            node.attributes.setdefault("softmax_precision", ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value))
    casts = retype(model, wanted, vectors | trained)
    casts += _narrow_outputs(model, ranges, ir)
    passes.RemoveUnusedNodesPass()(model)
    names = {str(node.outputs[0].name): reason for node, reason in kept.items() if node in wanted}
    return Mixed(names, len(computing), casts)


def _held(model: onnx_ir.Model, names: Collection[str]) -> frozenset[str]:
    """The initializers of names; of a bank there may be several tables, each with one more `_`."""
    held = (str(name) for name in model.graph.initializers)
    return frozenset(name for name in held if name in names or name.rstrip("_") in {one.rstrip("_") for one in names})


def _halve_summands(model: onnx_ir.Model, kept: KeptNodes, ranges: Ranges, swappable: Collection[str]) -> None:
    """Store the weight of `W + b` in float16: the sum is float32, and the file would be twice as large."""
    ir: Any = require("onnx_ir", "onnx", "convert a model to float16")
    writer = Writer(model)
    for weight in list(model.graph.initializers.values()):
        readers = [use.node for use in weight.uses() if use.node in kept]
        large = weight.shape is not None and len(weight.shape) > 1 and weight.name not in swappable
        sums = all(one.op_type == "Add" and kept[one] == READS_VECTOR for one in readers)
        if not (readers and large and sums and floats([weight])) or why_out(ranges.get(str(weight.name))):
            continue
        assert weight.const_value is not None
        name, numbers = str(weight.name), read_tensor(weight.const_value)
        weight.const_value = ir.tensor(numbers.astype(np.float16), name=name)
        weight.dtype = ir.DataType.FLOAT16
        wide = writer.add(model.graph, "Cast", weight, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
        wide.shape = weight.shape
        for node in readers:
            node.replace_input_with(list(node.inputs).index(weight), wide)
        kept[writer.made(wide)] = READS_VECTOR


def _narrow_outputs(model: onnx_ir.Model, ranges: Ranges, ir: Any) -> int:
    """Give outputs in float16 what operators that stay make, where float16 holds it."""
    writer, count = Writer(model), 0
    for value in list(floats(model.graph.outputs)):
        node = value.producer()
        if value.dtype == ir.DataType.FLOAT and node is not None and not why_out(ranges.get(str(value.name))):
            new = writer.add(node, "Cast", value, dtype=ir.DataType.FLOAT16, to=ir.DataType.FLOAT16.value)
            new.shape = value.shape
            inner = [use for use in value.uses() if use.node is not new.producer()]
            writer.replace(value, new)
            for use in inner:  # what reads it besides goes on to read float32
                use.node.replace_input_with(use.idx, value)
            count += 1
    return count


def _kind(reason: str) -> str:
    if reason.endswith(LOST):
        return "by constants that float16 loses"
    if " is up to " in reason:
        return "by large values"
    return "by tiny values" if " is at most " in reason else reason


def fit_inputs(model: onnx_ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Floating arrays in the dtypes that the inputs of a model have."""
    dtypes = {str(value.name): value.dtype.numpy() for value in floats(model.graph.inputs) if value.dtype is not None}
    return {name: value.astype(dtypes[name]) if name in dtypes else value for name, value in feed.items()}
