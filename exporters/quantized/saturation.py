"""The static quantisers behind vectors, which clip to what the base's activations were, and what became of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.exporters.onnx_file.constants import Constants
from onelora_compile.exporters.quantized.quantizers import Range, range_of
from onelora_compile.printable import percent, shortened

if TYPE_CHECKING:
    import onnx_ir

# Ops that move quantised numbers and change none.
_PASSED = {
    "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Gather", "Split",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_BOUNDS = {
    "Softmax": (0, 1),
    "Sigmoid": (0, 1),
    "HardSigmoid": (0, 1),
    "Tanh": (-1, 1),
    "Softsign": (-1, 1),
    "Erf": (-1, 1),
}


@dataclasses.dataclass(frozen=True)
class Widened:
    """A range before and after, and the share of its activation's values that the old one would have clipped."""

    before: tuple[float, float]
    after: tuple[float, float]
    beyond: float


@dataclasses.dataclass(frozen=True)
class Saturation:
    """What became of the quantisers behind the vectors.

    Attributes:
        quantizers: names of the activations whose ranges were calibrated on the base.
        inputs: how many calibration inputs were run; 0 where nothing was measured.
        widened: by name, the ranges that were too narrow.
        clipping: by name, the share of values beyond a range that could not be widened.
    """

    quantizers: tuple[str, ...]
    inputs: int
    widened: dict[str, Widened]
    clipping: dict[str, float]

    def __str__(self) -> str:
        if not self.quantizers:
            return "no range that was calibrated on the base lies behind a vector"
        count = f"{len(self.quantizers)} activations behind the vectors have ranges that were calibrated on the base"
        if not self.inputs:
            return f"{count}: nothing was measured, they may saturate"
        worst = max((one.beyond for one in self.widened.values()), default=0.0)
        text = f"{count}: on {self.inputs} calibration inputs {len(self.widened)} were too narrow"
        if self.widened:
            text += f" (for up to {percent(worst)} of their values) and were widened"
        if self.clipping:
            text += f"; {len(self.clipping)} can't be widened and clip up to {percent(max(self.clipping.values()))}"
        return text


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """A static quantiser behind a vector.

    Attributes:
        node: the QuantizeLinear, or another op that quantises.
        name: of the activation.
        held: its range; None where there is not one for the whole tensor.
        readers: the DequantizeLinear nodes of its numbers.
        between: the ops that its numbers pass on their way there.
        fixed: why its range can't be changed; "" where it can.
    """

    node: onnx_ir.Node
    name: str
    held: Range | None
    readers: tuple[onnx_ir.Node, ...]
    between: tuple[onnx_ir.Node, ...]
    fixed: str


def quantizers_behind(changed: Iterable[onnx_ir.Value], model: onnx_ir.Model, constants: Constants) -> list[Quantizer]:
    """The static quantisers that changed values reach, in the order in which they are reached."""
    owners = {graph: node for node in model.graph.all_nodes() for graph in _bodies(node)}
    found: dict[onnx_ir.Node, Quantizer] = {}
    queue: list[onnx_ir.Value] = list(changed)
    seen: set[onnx_ir.Value] = set()
    while queue:
        value = queue.pop(0)
        if value in seen:
            continue
        seen.add(value)
        for use in value.uses():
            queue += use.node.outputs
            queue += [out for body in _bodies(use.node) for node in body for out in node.outputs]
            if use.node not in found and use.idx == 0 and (one := _quantizer(use.node, model, constants)) is not None:
                found[use.node] = one
        if value.is_graph_output() and value.graph in owners:
            queue += owners[value.graph].outputs
    return list(found.values())


def _bodies(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    for held in node.attributes.values():
        if held.type.name == "GRAPH":
            yield held.as_graph()
        elif held.type.name == "GRAPHS":
            yield from held.as_graphs()


def _quantizer(node: onnx_ir.Node, model: onnx_ir.Model, constants: Constants) -> Quantizer | None:
    source = node.inputs[0]
    assert source is not None
    name = source.name or node.name or node.op_type
    if node.op_type.startswith("QLinear") or node.op_type == "QGemm":
        return Quantizer(node, name, None, (), (), f"{node.op_type} quantises inside")
    if node.op_type != "QuantizeLinear" or not constants.known(node.inputs[1]):
        return None
    held = range_of(node, constants)
    if held is None:
        return Quantizer(node, name, None, (), (), "it has several scales")
    maker = source.producer()
    low, high = _BOUNDS.get(maker.op_type if maker is not None else "", (-np.inf, np.inf))
    if held.low <= low + held.step and held.high >= high - held.step:
        return None
    readers, between, fixed = _readers(node.outputs[0])
    if node.graph is not model.graph:
        fixed = "it is inside a body"
    return Quantizer(node, name, held, tuple(readers), tuple(between), fixed)


def _readers(q: onnx_ir.Value) -> tuple[list[onnx_ir.Node], list[onnx_ir.Node], str]:
    readers, between, fixed, queue = [], [], "", [q]
    while queue:
        value = queue.pop()
        if value.is_graph_output():
            fixed = "its integers are an output of the model"
        for use in value.uses():
            if use.node.op_type == "DequantizeLinear" and use.idx == 0:
                readers.append(use.node)
            elif use.node.op_type in _PASSED and use.idx == 0:
                between.append(use.node)
                queue += use.node.outputs
            else:
                fixed = f"{use.node.op_type} reads its integers"
    return readers, between, fixed


def refusal(quantizers: Sequence[Quantizer]) -> ExportError:
    """What is said where nothing is known about the ranges."""
    names = shortened((repr(one.name) for one in quantizers), 4)
    return ExportError(
        f"{len(quantizers)} activations behind the vectors are clipped to ranges that were calibrated on the base "
        f"({names}), and the vectors may lead beyond them. Give calibration=inputs, and they are measured and widened "
        "where needed; or on_saturation='allow' to leave the ranges as they are"
    )
