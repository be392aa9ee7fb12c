"""Constants that float16 makes zero or infinite, and what reads them: it stays in float32, whatever was asked.

    h / (norm(h) + 1e-8)        Add, which reads the constant, and Div, which reads what is as small for a row of zeros

In float16 the sum would be zero there, and the quotient NaN; on other inputs nothing shows it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from onelora_compile.exporters.half.ranges import INFINITE, ZERO
from onelora_compile.exporters.half.retype import FLOATS
from onelora_compile.exporters.onnx_file.load import read_tensor
from onelora_compile.exporters.opsets.one_node import constant_of

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram
    from torch.fx import Node

LOST = " in float16"  # the end of such a reason
MOVES = frozenset(
    "Reshape Transpose Slice Concat Gather Split Squeeze Unsqueeze Expand Identity Pad Tile Flatten Where Neg".split()
)
# What they make can be as small, or as large, as what they read.
_CARRIES = MOVES | frozenset("Cast Add Sub Max Min Clip Abs Sqrt Reciprocal Pow".split())
_WIDE = (*FLOATS, "DOUBLE")
_NUMBERS = ("Tensor", "number", "Optional[Tensor]", "Optional[number]")  # what a schema calls them


def lost_constants(model: onnx_ir.Model, held: Collection[str] = ()) -> dict[onnx_ir.Node, str]:
    """The operators of the main graph that have to do with such constants, with the constant of each.

    Args:
        model: in float32, its dtypes known.
        held: initializers that others replace.
    """
    found: dict[onnx_ir.Node, str] = {}
    for value, tensor in _constants(model):
        if value.name not in held and tensor.dtype.name in _WIDE and (size := _lost(read_tensor(tensor))):
            became = "zero" if size < 1 else "infinite"
            _follow(value, f"a constant of {size:.2g}, {value.name}, is {became}{LOST}", found)
    return found


def loses(program: ExportedProgram, originals: Mapping[str, Tensor]) -> bool:
    """Whether a program that was captured in float16 may have lost a constant.

    Args:
        program: the program.
        originals: the model's own tensors, before they were rounded.
    """
    held = [*originals.values(), *(one for one in program.constants.values() if isinstance(one, Tensor))]
    wide = [one.detach() for one in held if one.dtype in (torch.float32, torch.float64, torch.bfloat16)]
    graphs = [one.graph for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]
    literals = (number for graph in graphs for node in graph.nodes for number in _literals(node))
    return any(_lost(np.float64(one)) for one in literals) or any(_lost(one.float().cpu().numpy()) for one in wide)


def _constants(model: onnx_ir.Model) -> Iterator[tuple[onnx_ir.Value, Any]]:
    values = [*model.graph.initializers.values()]
    values += [node.outputs[0] for node in model.graph if node.op_type == "Constant"]
    yield from ((value, tensor) for value in values if (tensor := constant_of(value)) is not None)
    for node in model.graph:
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            yield node.outputs[0], node.attributes["value"].as_tensor()


def _lost(numbers: np.ndarray | np.float64) -> float:
    """The magnitude of what is lost: the largest number, which becomes infinite, or zero as all of them; else 0."""
    if not numbers.size:
        return 0.0
    largest = max(float(numbers.max()), -float(numbers.min()))
    if not math.isfinite(largest):  # of the others
        held = np.abs(np.asarray(numbers)[np.isfinite(numbers)])
        largest = float(held.max()) if held.size else 0.0
    return largest if largest >= INFINITE or largest <= ZERO else 0.0


def _follow(constant: onnx_ir.Value, reason: str, found: dict[onnx_ir.Node, str]) -> None:
    """Up to what gives other numbers: a quotient, a product, a softmax."""
    if (own := constant.producer()) is not None:
        found[own] = reason
    seen, values = set(), [(constant, True)]
    while values:
        value, direct = values.pop()
        for node in (use.node for use in value.uses() if use.node.graph is constant.graph):
            if (node, direct) in seen:
                continue
            seen.add((node, direct))
            found.setdefault(node, reason)
            if direct or node.op_type in _CARRIES:
                kinds = [one for one in node.outputs if one.dtype is not None and one.dtype.name in _WIDE]
                values += [(one, direct and node.op_type in {*MOVES, "Cast"}) for one in kinds]


def _literals(node: Node) -> Iterator[float]:
    """Numbers that an operator of float16 computes with; not a norm's epsilon, which is of the operator itself."""
    schema = getattr(node.target, "_schema", None)
    made = [one for one in pytree.tree_leaves(node.meta.get("val")) if isinstance(one, Tensor)]
    if schema is None or not any(one.dtype is torch.float16 for one in made):
        return
    for index, argument in enumerate(schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, int | float) and str(argument.type) in _NUMBERS:
            yield float(given)
