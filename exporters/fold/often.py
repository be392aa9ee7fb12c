"""How often one run of a file computes with a weight at most: of the branches of an If one runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir

    from onelora_compile.exporters.fold.find_weights import WeightUse


def bodies_of(model: onnx_ir.Model) -> dict[Any, onnx_ir.Node]:
    """The node that each body of a model belongs to."""
    ir: Any = require("onnx_ir", "onnx", "fold into an ONNX model")
    found: dict[Any, onnx_ir.Node] = {}
    for node in model.graph.all_nodes():
        for one in node.attributes.values():
            if one.type == ir.AttributeType.GRAPH:
                found[one.as_graph()] = node
            elif one.type == ir.AttributeType.GRAPHS:
                found |= dict.fromkeys(one.as_graphs(), node)
    return found


def times_of(uses: Iterable[WeightUse], bodies: Mapping[Any, onnx_ir.Node]) -> int:
    """How many of the uses one run has at most; a body of a loop counts once, an op that nothing reads not at all.

    Args:
        uses: of one weight, or of its copies.
        bodies: as `bodies_of` gives them.
    """
    ops = {use.op for use in uses if any(out.uses() or out.is_graph_output() for out in use.op.outputs)}
    here = Counter(op.graph for op in ops)
    while inner := [graph for graph in here if graph in bodies]:
        deepest = max(inner, key=lambda graph: _depth(graph, bodies))
        node = bodies[deepest]
        beside = [graph for graph, owner in bodies.items() if owner is node]
        counts = [here.pop(graph, 0) for graph in beside]
        here[node.graph] += max(counts) if node.op_type == "If" else sum(counts)
    return sum(here.values())


def _depth(graph: Any, bodies: Mapping[Any, onnx_ir.Node]) -> int:
    return 1 + _depth(bodies[graph].graph, bodies) if graph in bodies else 0
