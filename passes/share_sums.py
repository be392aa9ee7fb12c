"""Take the feature sum of an input once, where several adapted linears read it (q, k, v; gate, up).

    rank1_update(q, x, b1), rank1_update(k, x, b2)
    ->   s = feature_sum(x);  add_rank1(q, s, b1), add_rank1(k, s, b2)

Every update is rewritten, a lone one too, so that the passes after this one meet one spelling.  It also adds the
gradients of the siblings while they are [*, 1], before they are spread over x.  Does not share across a node that
may write to a tensor in place: the input may be another one after it.  Leaves alone updates by nested and
sparse inputs, where the composite operator knows which operators these have.
"""

from __future__ import annotations

import torch
from torch import fx

from onelora_compile.dynamo.private_api import is_of_a_transform, on_examples
from onelora_compile.ops import ADD_RANK1, FEATURE_SUM, RANK1_UPDATE, feature_sum
from onelora_compile.passes.graph.writes import mutates
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.sites.linear_site import example, module_path, operands

LAYOUT = "its input is no plain tensor (nested, sparse)"


def share_feature_sum(gm: fx.GraphModule) -> PassResult:
    """Rewrite every rank-1 update of the graph, in place."""
    result = PassResult("share_feature_sum")
    sums: dict[fx.Node, fx.Node] = {}  # x -> its feature sum, valid until the next write
    for node in list(gm.graph.nodes):
        if mutates(gm, node):
            sums.clear()
        elif node.op == "call_function" and node.target is FEATURE_SUM:
            (x,) = node.all_input_nodes
            if x in sums:
                node.replace_all_uses_with(sums[x])
                gm.graph.erase_node(node)
            else:
                sums[x] = node
        elif node.op == "call_function" and node.target is RANK1_UPDATE:
            x, name = operands(node)[1], module_path(node) or node.name
            if (value := example(x)) is not None and value.layout != torch.strided:
                result.skips[name] = LAYOUT
                continue
            if x not in sums:
                sums[x] = _insert_sum(gm.graph, node, x)
            _rewrite(gm.graph, node, sums[x])
            result.rewrites.append(name)
    return result


def _insert_sum(graph: fx.Graph, update: fx.Node, x: fx.Node) -> fx.Node:
    with graph.inserting_before(update):
        node = graph.call_function(FEATURE_SUM, (x,))
    node.meta = {key: value for key, value in update.meta.items() if key not in ("example_value", "val")}
    if (value := example(x)) is not None and not is_of_a_transform(value):
        with on_examples((value,)):
            node.meta["val" if "val" in update.meta else "example_value"] = feature_sum(value)
    return node


def _rewrite(graph: fx.Graph, update: fx.Node, s: fx.Node) -> None:
    y, _, vector = operands(update)
    with graph.inserting_before(update):
        node = graph.call_function(ADD_RANK1, (y, s, vector))
    node.meta = update.meta.copy()
    update.replace_all_uses_with(node)
    graph.erase_node(update)
