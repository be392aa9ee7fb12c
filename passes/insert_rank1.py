"""Adapt linear ops of a graph: give each a rank-1 update with a vector that is a new graph input.

    y = linear(x, W, c)   ->   y = onelora::rank1_update(linear(x, W, c), x, vector)
    any use of W          ->   the same use of onelora::adapted_weight(W, vector)       (`insert_weight`)

The vectors are inputs, not constants, so their values can change without a new compilation.  Leaves alone (1) a
site that is adapted already, (2) a site that `vectors` does not name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx

from onelora_compile.ops import ADAPTED_WEIGHT, RANK1_UPDATE
from onelora_compile.passes.match_linear import LinearSite, example, match_linear
from onelora_compile.passes.result import PassResult

ADAPTED = "adapted already"
NOT_NAMED = "no vector of this name was given"


def insert_rank1(
    gm: fx.GraphModule, vectors: Mapping[str, Tensor], name_of: Callable[[LinearSite], str] | None = None
) -> tuple[PassResult, list[str]]:
    """Insert an update at every site that has a vector.

    Args:
        gm: changed in place.
        vectors: [out_features] each, by the name that `name_of` gives a site.
        name_of: names a site; the default is the path of the module that made the call.

    Returns:
        The result, and the names of the vectors in the order in which they were appended to the graph's inputs.

    Example:
        >>> import torch
        >>> gm = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> result, inputs = insert_rank1(gm, {"0": torch.ones(3)})
        >>> gm.recompile() and None
        >>> x, y = torch.ones(1, 4), gm(torch.ones(1, 4), torch.zeros(3))
        >>> bool(torch.allclose(gm(x, torch.ones(3)), y + 4))
        True
    """
    result = PassResult("insert_rank1")
    inputs: dict[str, fx.Node] = {}
    for site in match_linear(gm):
        name = name_of(site) if name_of else site.module
        if reason := _why_not(site, name, vectors):
            result.skips[name or site.node.name] = reason
            continue
        if name not in inputs:  # a module that is called twice has one vector
            inputs[name] = _add_input(gm.graph, site.node, name, vectors[name])
        _rewrite(gm.graph, site, inputs[name])
        result.rewrites.append(name)
    return result, list(inputs)


def insert_weight(gm: fx.GraphModule, weight: fx.Node, vector: Tensor, dims: Sequence[int]) -> fx.Node:
    """Adapt a weight that is read directly: everything that uses the graph input `weight` gets W + vector 1ᵀ.

    Args:
        gm: changed in place.
        weight: an input of the graph.
        vector: of the axes of the weight less `dims`.
        dims: input axes of the weight.

    Returns:
        The new input, the last one.
    """
    node = _add_input(gm.graph, weight, weight.name, vector)
    with gm.graph.inserting_after(node):
        adapted = gm.graph.call_function(ADAPTED_WEIGHT, (weight, node, list(dims)))
    adapted.meta = weight.meta.copy()
    weight.replace_all_uses_with(adapted, delete_user_cb=lambda user: user is not adapted)
    return node


def _why_not(site: LinearSite, name: str, vectors: Mapping[str, Tensor]) -> str | None:
    if site.update is not None:
        return ADAPTED
    return None if name in vectors else NOT_NAMED


def _add_input(graph: fx.Graph, beside: fx.Node, name: str, vector: Tensor) -> fx.Node:
    last = max((node for node in graph.nodes if node.op == "placeholder"), default=None)
    with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder("onelora_vector_" + name.replace(".", "_"))
    if (y := example(beside)) is not None:
        fake_mode = getattr(y, "fake_mode", None)
        node.meta["example_value"] = fake_mode.from_tensor(vector) if fake_mode is not None else vector
    return node


def _rewrite(graph: fx.Graph, site: LinearSite, vector: fx.Node) -> None:
    with graph.inserting_after(site.node):
        update = graph.call_function(RANK1_UPDATE, (site.node, site.x, vector))
    update.meta = site.node.meta.copy()
    site.node.replace_all_uses_with(update, delete_user_cb=lambda user: user is not update)
