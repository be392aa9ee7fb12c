"""Open `F.multi_head_attention_forward`, which Dynamo keeps as one node, so that the linears in it can be seen.

    multi_head_attention_forward(q, k, v, …, W_in, …, W_out, …)  ->  linear, scaled_dot_product_attention, linear, …

The function is traced on the example values of its arguments, down to operators that autograd, autocast and dropout
still act on.  Leaves alone a node without an adapted weight, unless told otherwise, and one without example values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from onelora_compile.dynamo.private_api import on_examples
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.graph.emit import inline
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.sites.linear_site import module_path
from onelora_compile.passes.sites.weight_path import example

ATTENTION = torch.nn.functional.multi_head_attention_forward
NO_SHAPES = "the graph carries no example values"
NOT_ADAPTED = "none of its weights is adapted"


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
    return NO_SHAPES if any(example(argument) is None for argument in node.all_input_nodes) else None


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    sources = list(node.all_input_nodes)  # each once: the function compares query, key and value by identity

    def attend(*tensors: Tensor) -> Any:
        values = dict(zip(sources, tensors, strict=True))
        arguments: Any = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = arguments
        return [part for part in ATTENTION(*args, **kwargs) if part is not None]

    examples = [example(source) for source in sources]
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
