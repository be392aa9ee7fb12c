"""Rewrite each adapted linear to the form in which it is fast.

    s = feature_sum(x);  add_rank1(linear(x, W, c), s, b)   ->   the lowering's own operators

The lowerings are in `lowerings/`.  Leaves alone updates without shapes on their nodes, and those of outputs that are
split over processes: the composite operator decomposes by itself, and knows what is partial.  Runs after
share_feature_sum, which leaves one spelling and one sum per input.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from onelora_compile.ops import ADD_RANK1, FEATURE_SUM, accumulation_dtype
from onelora_compile.passes.lowerings import LOWERING, LOWERINGS, Choice, choose, update_of
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.sites.linear_site import example, module_path
from onelora_compile.sharded import is_sharded

SHARDED = "its output is split over processes"
NO_SHAPES = "the graph carries no example values"


def fuse_rank1(gm: fx.GraphModule, lowering: str | None = None) -> PassResult:
    """Rewrite every update of the graph, in place.

    Args:
        gm: changed in place.
        lowering: the name of the one to take where it can be taken; None for the rule.
    """
    result = PassResult("fuse_rank1")
    for node in list(gm.graph.find_nodes(op="call_function", target=ADD_RANK1)):
        name = module_path(node) or node.name
        if any(example(argument) is None for argument in node.all_input_nodes):
            result.skips[name] = NO_SHAPES
            continue
        update = update_of(node)
        if is_sharded(example(update.y)):
            result.skips[name] = SHARDED
            node.meta[LOWERING] = Choice("composite operator", SHARDED, update.y.name)
            continue
        choice = choose(update, lowering)
        if lowering not in (None, choice.name):
            result.skips[name] = choice.why
        new = LOWERINGS[choice.name].rewrite(gm.graph, update)
        new.meta[LOWERING] = dataclasses.replace(choice, of=update.y.name)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if not update.y.users:  # the lowering computes the linear too
            gm.graph.erase_node(update.y)
        result.rewrites.append(name)
    for node in list(gm.graph.find_nodes(op="call_function", target=FEATURE_SUM)):
        _plain_sum(gm.graph, node)
    return result


def _plain_sum(graph: fx.Graph, s: fx.Node) -> None:
    x = s.args[0]
    assert isinstance(x, fx.Node)
    if s.users and (value := example(x)) is not None:
        keywords: dict[str, Any] = {"dim": -1, "keepdim": True, "dtype": accumulation_dtype(value.dtype)}
        with graph.inserting_before(s):
            plain = graph.call_function(torch.sum, (x,), keywords)
        plain.meta = s.meta.copy()
        s.replace_all_uses_with(plain)
    if not s.users:
        graph.erase_node(s)
