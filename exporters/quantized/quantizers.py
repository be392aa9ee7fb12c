"""QuantizeLinear and DequantizeLinear of activations: the range that a pair can hold, and where an update passes it.

A static pair clips to a range that was calibrated on the base.  What is added before it may leave that range; behind it
the base's numbers are as they were, and nothing is lost.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.exporters.onnx_file.constants import Constants

if TYPE_CHECKING:
    import onnx_ir

    from onelora_compile.exporters.onnx_file.node_writer import Writer


@dataclasses.dataclass(frozen=True)
class Range:
    """What a static quantiser can hold.

    Attributes:
        low, high: the smallest and the largest number.
        step: between two numbers (of a float of 8 bits, at its smallest).
        clips: the side on which its end is zero, where quantisers leave out a Relu before it: "low", "high" or "".
    """

    low: float
    high: float
    step: float
    clips: str


def limits(dtype: onnx_ir.DataType) -> tuple[float, float]:
    """The smallest and the largest number of a quantised dtype."""
    import ml_dtypes

    kind: Any = dtype.numpy()
    info: Any = ml_dtypes.finfo(kind) if dtype.is_floating_point() else ml_dtypes.iinfo(kind)
    return float(info.min), float(info.max)


def range_of(node: onnx_ir.Node, constants: Constants) -> Range | None:
    """The range of a QuantizeLinear of one known scale; None for others."""
    scale, zero = (node.inputs[at] if at < len(node.inputs) else None for at in (1, 2))
    if (
        node.op_type != "QuantizeLinear"
        or not constants.known(scale)
        or (zero is not None and not constants.known(zero))
    ):
        return None
    assert scale is not None
    step = constants.numbers(scale).astype(np.float64)
    point = 0.0 if zero is None else constants.numbers(zero).astype(np.float64)
    if step.size != 1 or np.size(point) != 1:
        return None
    low, high = (
        (end - float(np.reshape(point, ()))) * float(step.reshape(()))
        for end in limits(quantized_dtype(node, constants))
    )
    return Range(low, high, float(step.reshape(())), "low" if low == 0 else "high" if high == 0 else "")


def quantized_dtype(node: onnx_ir.Node, constants: Constants) -> onnx_ir.DataType:
    """The dtype that a QuantizeLinear writes."""
    return constants.dtype(node.outputs[0])


def behind_pairs(y: onnx_ir.Value, writer: Writer, constants: Constants) -> onnx_ir.Value:
    """Where an update of a value can be added with the same effect, behind the quantisers that follow.

    An update passes a pair (what it adds is not rounded then) and, towards another pair, an addition.  It does not pass
    a pair that stands for a Relu too.
    """
    best = y
    while not y.is_graph_output():
        uses = list(y.uses())
        if len(uses) != 1 or uses[0].node.graph is not y.producer().graph:  # type: ignore[union-attr]
            break
        node = uses[0].node
        if node.op_type == "Add" or (node.op_type == "Sub" and uses[0].idx == 0):
            y = node.outputs[0]
            continue
        held = range_of(node, constants)
        if held is None or held.clips:
            break
        opened = _one_reader(node, writer)
        if opened is None:
            break
        best = y = opened
    return best


def _one_reader(node: onnx_ir.Node, writer: Writer) -> onnx_ir.Value | None:
    """The output of the DequantizeLinear behind a QuantizeLinear, of several made one; None for other readers."""
    q = node.outputs[0]
    readers = [use.node for use in q.uses()]
    if q.is_graph_output() or not readers or any(one.op_type != "DequantizeLinear" for one in readers):
        return None
    if any(list(one.inputs[1:3]) != list(node.inputs[1:3]) for one in readers):
        return None
    if len(readers) == 1 and readers[0].graph is node.graph:
        return readers[0].outputs[0]
    first = writer.add(node, "DequantizeLinear", *readers[0].inputs, dtype=readers[0].outputs[0].dtype)
    for one in readers:
        writer.replace(one.outputs[0], first)
        assert one.graph is not None
        one.graph.remove(one, safe=True)
    return first
