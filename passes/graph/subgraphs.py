"""The graphs inside higher-order ops (checkpointing, cond, scan), and which of their inputs are which outer nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class Scope:
    """A graph, and where the graphs around it give it its inputs.

    Attributes:
        gm: the graph.
        call: the higher-order op that runs it; None for the outermost graph.
        outer: for each of its inputs that is an input of the outermost graph, that one.
    """

    gm: fx.GraphModule
    call: fx.Node | None
    outer: dict[fx.Node, fx.Node]


def scopes(gm: fx.GraphModule) -> list[Scope]:
    """The graph and all graphs inside it, outermost first."""
    inputs = gm.graph.find_nodes(op="placeholder")
    found = [Scope(gm, None, {node: node for node in inputs})]
    for scope in found:  # grows while it is walked
        found += _inside(scope)
    return found


def _inside(scope: Scope) -> Iterator[Scope]:
    for call in scope.gm.graph.nodes:
        if call.op != "call_function":
            continue
        nodes = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]
        graphs = [graph for node in nodes if (graph := _graph(scope.gm, node)) is not None]
        given = [node for node in nodes if _graph(scope.gm, node) is None]
        for graph in graphs:
            # What a subgraph gets are the last arguments: cond has the condition before them.
            inputs = graph.graph.find_nodes(op="placeholder")
            pairs = zip(reversed(inputs), reversed(given), strict=False)
            outer = {inner: scope.outer[node] for inner, node in pairs if node in scope.outer}
            yield Scope(graph, call, outer)


def _graph(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if node.op != "get_attr":
        return None
    held = getattr(gm, str(node.target), None)
    return held if isinstance(held, fx.GraphModule) else None
