"""Open `F.multi_head_attention_forward`, which Dynamo keeps as one node, so that the linears in it can be seen.

    multi_head_attention_forward(q, k, v, …, W_in, …, W_out, …)  ->  linear, scaled_dot_product_attention, linear, …

The function is traced on the example values of its arguments, down to operators that autograd, autocast and dropout
still act on.  A number among them that Dynamo holds dynamic (the dropout) is guarded on if the function asks for it.
Leaves alone a node without an adapted weight, unless told otherwise, one without example values, and one inside a
`torch.func` transform, whose example values no operator runs on: its weights are adapted where they are read.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from onelora_compile.dynamo.private_api import is_of_a_transform, on_examples
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.graph.emit import inline
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.sites.linear_site import LinearSite, example, module_path, source_line
from onelora_compile.passes.sites.weight_path import weight_chains

ATTENTION = torch.nn.functional.multi_head_attention_forward
NO_SHAPES = "the graph carries no example values"
NOT_ADAPTED = "none of its weights is adapted"
TRANSFORMED = "the attention is inside a torch.func transform"

_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")


def expand_attention(gm: fx.GraphModule, everything: bool = False) -> PassResult:
    """Inline every such node, in place; `everything` includes those without an adapted weight."""
    result = PassResult("expand_attention")
    for node in list(gm.graph.find_nodes(op="call_function", target=ATTENTION)):
        name = module_path(node) or node.name
        if reason := _why_not(node, everything):
            result.skips[name] = reason
            continue
        _inline(gm.graph, node)
        result.rewrites.append(name)
    return result


def _why_not(node: fx.Node, everything: bool) -> str | None:
    if not everything and not any(argument.target is ADAPTED_WEIGHT for argument in node.all_input_nodes):
        return NOT_ADAPTED
    values = [_value(argument) for argument in node.all_input_nodes]
    if any(map(is_of_a_transform, values)):
        return TRANSFORMED
    return NO_SHAPES if any(value is None for value in values) else None


def _value(node: fx.Node) -> Any:
    """The example value of an argument: a tensor, or a number that Dynamo holds dynamic."""
    return node.meta.get("example_value", node.meta.get("val"))


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    sources = list(node.all_input_nodes)  # each once: the function compares query, key and value by identity

    def attend(*inputs: Any) -> Any:
        values = dict(zip(sources, inputs, strict=True))
        arguments: Any = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = arguments
        return [part for part in ATTENTION(*args, **kwargs) if part is not None]

    examples = [_value(source) for source in sources]
    with torch.enable_grad(), on_examples(examples):
        traced = make_fx(attend, pre_dispatch=True)(*examples)
    parts = inline(graph, node, traced, sources)
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        if index < len(parts):
            user.replace_all_uses_with(parts[index])
        graph.erase_node(user)
    graph.erase_node(node)


def closed_sites(gm: fx.GraphModule) -> Iterator[tuple[LinearSite, str]]:
    """The linears inside every such node that can't be opened, which have no op of their own, each with the reason."""
    chains = weight_chains(gm)
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        reason = _why_not(node, everything=True) or ""
        given = inspect.signature(ATTENTION).bind(*node.args, **node.kwargs).arguments
        for weight in filter(None, map(given.get, _WEIGHTS)):
            chain = chains.get(weight)
            value = None if chain is None else example(chain.root)
            rows, columns = (None, None) if value is None else value.shape
            place = module_path(node), columns, rows, source_line(node)
            yield LinearSite(node, "linear", given["query"], weight, (-1,), chain, None, *place), reason
