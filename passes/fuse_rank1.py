"""Choose for each adapted linear how it is made fast, and rewrite it to that form.

    s = feature_sum(x);  add_rank1(y, s, b)   ->   the lowering's own operators

A lowering is a function that rewrites one update; `LOWERINGS` names them.  The only one so far:

`producer_consumer`: plain `sum` and `addcmul`.  Inductor computes the sum in the kernel that produces x (LayerNorm,
GELU) and the update in the kernel that consumes y, so that neither makes a pass of its own over memory.

Leaves alone updates without shapes on their nodes: the composite operator decomposes by itself.  Runs after
share_feature_sum, which leaves one spelling and one sum per input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from onelora_compile.ops import ADD_RANK1, FEATURE_SUM, accumulation_dtype
from onelora_compile.passes.match_linear import example, module_path, operands
from onelora_compile.passes.result import PassResult

NO_SHAPES = "the graph carries no example values"
LOWERING = "onelora_lowering"  # key in node.meta


def fuse_rank1(gm: fx.GraphModule) -> PassResult:
    """Rewrite every update of the graph, in place."""
    result = PassResult("fuse_rank1")
    for node in gm.graph.find_nodes(op="call_function", target=FEATURE_SUM):
        _plain_sum(gm.graph, node)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not ADD_RANK1:
            continue
        name = module_path(node) or node.name
        if any(example(argument) is None for argument in node.all_input_nodes):
            result.skips[name] = NO_SHAPES
            continue
        lowering = _choose(node)
        LOWERINGS[lowering](gm.graph, node)
        result.rewrites.append(name)
    return result


def _choose(node: fx.Node) -> str:
    """Which lowering; the place for a measured choice by shape, dtype and device."""
    del node
    return "producer_consumer"


def _producer_consumer(graph: fx.Graph, update: fx.Node) -> None:
    y, s, vector = operands(update)
    value = example(update)
    dtypes = {tensor.dtype for tensor in map(example, (y, s, vector)) if tensor is not None}
    with graph.inserting_before(update):
        fused = graph.call_function(torch.addcmul, (y, s, vector))
        fused.meta = update.meta | {LOWERING: "producer_consumer"}
        if len(dtypes) > 1 and value is not None:  # addcmul promoted: round once, to y's dtype
            rounded = graph.call_method("to", (fused, value.dtype))
            rounded.meta = fused.meta.copy()
            fused.meta["example_value"] = value.to(accumulation_dtype(value.dtype))
            fused = rounded
    update.replace_all_uses_with(fused)
    graph.erase_node(update)


def _plain_sum(graph: fx.Graph, s: fx.Node) -> None:
    x = s.args[0]
    assert isinstance(x, fx.Node)
    if (value := example(x)) is None:
        return
    keywords: dict[str, Any] = {"dim": -1, "keepdim": True, "dtype": accumulation_dtype(value.dtype)}
    with graph.inserting_before(s):
        plain = graph.call_function(torch.sum, (x,), keywords)
    plain.meta = s.meta.copy()
    s.replace_all_uses_with(plain)
    graph.erase_node(s)


LOWERINGS: dict[str, Callable[[fx.Graph, fx.Node], None]] = {"producer_consumer": _producer_consumer}
