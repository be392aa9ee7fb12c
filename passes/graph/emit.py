"""Write new nodes as ordinary tensor code: proxies that append to a graph, and keep its example values true."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from onelora_compile.dynamo.private_api import is_of_a_transform, on_examples
from onelora_compile.errors import PassError
from onelora_compile.passes.sites.operators import as_operator

_EXAMPLES = ("example_value", "val")


class Emitter:
    """Turns nodes into proxies; called with anything else it returns it. `made` holds the new nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.tracer = fx.proxy.GraphAppendingTracer(graph)
        self.made: list[fx.Node] = []

    def __call__(self, value: Any) -> Any:
        """A proxy of a node."""
        return fx.Proxy(value, self.tracer) if isinstance(value, fx.Node) else value


class _Recording(fx.proxy.GraphAppendingTracer):
    """Gives every node that is made the example value that its op has on those of its inputs."""

    def __init__(self, graph: fx.Graph, like: fx.Node, made: list[fx.Node]) -> None:
        super().__init__(graph)
        self.like, self.made = like, made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        key = "val" if "val" in self.like.meta else "example_value"
        if key == "val":
            as_operator(node)
        node.meta = {name: value for name, value in self.like.meta.items() if name not in _EXAMPLES}
        if (value := _run(node, self.like)) is not None:
            node.meta[key] = value
        self.made.append(node)
        return node


@contextlib.contextmanager
def emitting(graph: fx.Graph, after: fx.Node) -> Iterator[Emitter]:
    """New nodes follow `after` in the order in which they are written, with its metadata."""
    emitter = Emitter(graph)
    emitter.tracer = _Recording(graph, after, emitter.made)
    with graph.inserting_before(after.next):
        yield emitter


def inline(graph: fx.Graph, node: fx.Node, traced: fx.GraphModule, sources: Sequence[fx.Node]) -> Any:
    """Copy a traced graph before a node, with the node's metadata; the node stays.

    Args:
        graph: that holds the node.
        node: which the traced graph computes.
        traced: on the example values of `sources`.
        sources: what its inputs are.

    Returns:
        What the traced graph returns, of new nodes.
    """
    key = "val" if "val" in node.meta else "example_value"
    inner: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    with graph.inserting_before(node):
        for old in traced.graph.nodes:
            if old.op == "get_attr":
                raise PassError(f"a constant in {node.target}: {old.target}")
            if old.op in ("placeholder", "output"):
                continue
            new = inner[old] = graph.node_copy(old, inner.__getitem__)
            new.meta = {name: value for name, value in node.meta.items() if name not in _EXAMPLES}
            if "val" in old.meta:
                new.meta[key] = old.meta["val"]
    return fx.map_arg(traced.graph.output_node().args[0], inner.__getitem__)


def _run(node: fx.Node, like: fx.Node) -> Any:
    """The node on example values, in the fake mode of `like`'s; None where one is missing or belongs to a vmap."""

    def value(argument: fx.Node) -> Any:
        for key in _EXAMPLES:
            if key in argument.meta:
                return argument.meta[key]
        raise KeyError(argument.name)

    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    except KeyError:
        return None
    if any(map(is_of_a_transform, pytree.tree_leaves((args, kwargs)))):
        return None
    with torch.no_grad(), on_examples([*pytree.tree_leaves((args, kwargs)), *map(like.meta.get, _EXAMPLES)]):
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
