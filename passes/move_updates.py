"""Move updates from weights to activations: no weight-sized sum forward, no weight-sized gradient backward.

    linear(x, views(adapted_weight(W, b)), c)  ->  rank1_update(linear(x, views(W), c), x, views(b))
    bmm(x, adapted_weight(W, b))               ->  add_rank1(bmm(x, W), feature_sum(x), b[:, None])
    adapted_weight(W, b) @ x                   ->  add_rank1(W @ x, feature_sum(x.mT).mT, b[:, None])
    einsum, grouped_mm, conv                   ->  the same, with the axes that the op has
    addmm(c, x, adapted_weight(W, b), alpha=a) ->  rank1_update(addmm(c, x, W, alpha=a), x, a * b)

Leaves alone (1) an op that writes into a tensor that exists (`addmm_`, `out=`), (2) a use of the weight that is no
linear op, (3) one whose view mixes input and output features; such a use keeps `adapted_weight`, which is right and
slower.  Runs after expand_attention, before share_feature_sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

from onelora_compile.ops import ADAPTED_WEIGHT, ADD_RANK1, FEATURE_SUM, RANK1_UPDATE
from onelora_compile.passes.graph.emit import emitting
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.sites.contractions import conv_window
from onelora_compile.passes.sites.linear_site import LinearSite, example, match_linear
from onelora_compile.passes.sites.operators import arguments
from onelora_compile.passes.sites.weight_path import Chain, constant_along, part_of_vector

NO_SHAPES = "the graph carries no example values"
OVERLAPPING = "a convolution with overlapping windows, padding, dilation or groups"
MIXED = "a view of the weight mixes input and output features"


def weight_to_activation(gm: fx.GraphModule) -> PassResult:
    """Rewrite every linear op that uses an adapted weight, in place."""
    result = PassResult("weight_to_activation")
    bare: dict[fx.Node, fx.Node] = {}  # a node of a chain -> the same without the update
    updated: dict[fx.Node, fx.Node] = {}  # a linear op -> what its users read now
    for site in match_linear(gm):
        site = dataclasses.replace(site, x=updated.get(site.x, site.x))
        if site.chain is None or site.chain.adapted is None:
            continue
        name = site.module or site.node.name
        if reason := _why_not(site):
            result.skips[name] = reason
            continue
        updated[site.node] = _rewrite(gm.graph, site, bare)
        result.rewrites.append(name)
    for node in reversed(list(gm.graph.nodes)):
        if node.target is ADAPTED_WEIGHT or node in bare:
            if not node.users:
                gm.graph.erase_node(node)
            elif node.target is ADAPTED_WEIGHT:
                result.skips.setdefault(node.name, f"used by {next(iter(node.users)).name}, which is no linear op")
    return result


def _why_not(site: LinearSite) -> str | None:
    assert site.chain is not None
    assert site.chain.adapted is not None
    if site.fixed:
        return site.fixed
    weight = example(site.chain.root)
    if weight is None or example(site.x) is None or example(site.node) is None:
        return NO_SHAPES
    if site.kind == "einsum" and site.labels is None:
        return NO_SHAPES
    dims: Any = site.chain.adapted.args[2]
    if site.kind == "conv" and conv_window(site.node, example(site.weight)) is None:  # type: ignore[arg-type]
        return OVERLAPPING
    return None if constant_along(site.chain, weight.shape, dims, site.axes) else MIXED


def _rewrite(graph: fx.Graph, site: LinearSite, bare: dict[fx.Node, fx.Node]) -> fx.Node:
    assert site.chain is not None
    assert site.weight is not None
    site.node.replace_input_with(site.weight, _without_update(graph, site.chain, bare))
    with emitting(graph, site.node) as proxy:
        vector = _vector(site, site.chain, proxy)
        if site.alpha != 1:
            vector = vector * proxy(site.alpha)
        y, x = proxy(site.node), proxy(site.x)
        update: fx.Node = _UPDATES[site.kind](site, y, x, vector).node
    site.node.replace_all_uses_with(update, delete_user_cb=lambda user: user not in proxy.made)
    return update


def _without_update(graph: fx.Graph, chain: Chain, bare: dict[fx.Node, fx.Node]) -> fx.Node:
    """The chain again, from W instead of W + b 1ᵀ; each node of it is copied once."""
    assert chain.adapted is not None
    bare[chain.adapted] = chain.root
    for node in chain.nodes:
        if node not in bare:
            with graph.inserting_after(node):
                bare[node] = graph.node_copy(node, lambda arg: bare.get(arg, arg))
    return bare[(chain.adapted, *chain.nodes)[-1]]


def _vector(site: LinearSite, chain: Chain, proxy: Callable[[Any], Any]) -> Any:
    """The part of the vector that belongs to this use."""
    assert chain.adapted is not None
    _, vector, dims = chain.adapted.args
    stored: Any = example(chain.root)
    return part_of_vector(chain, proxy(vector), dims, site.axes, tuple(stored.shape), proxy)  # type: ignore[arg-type]


def _linear(site: LinearSite, y: Any, x: Any, vector: Any) -> Any:
    """`vector` [out_features], the features of x last."""
    return RANK1_UPDATE(y, x, vector)


def _matmul(site: LinearSite, y: Any, x: Any, vector: Any) -> Any:
    """`vector` [*experts, out_features]."""
    if _rank(vector) > 1:
        return ADD_RANK1(y, FEATURE_SUM(x), vector if _rank(x) == 1 else vector.unsqueeze(-2))
    return RANK1_UPDATE(y, x, vector)


def _left(site: LinearSite, y: Any, x: Any, vector: Any) -> Any:
    """`vector` [*, out_features]; x [*, in_features, n], or [in_features] alone."""
    if _rank(x) == 1:
        return RANK1_UPDATE(y, x, vector) if _rank(vector) == 1 else ADD_RANK1(y, FEATURE_SUM(x), vector)
    return ADD_RANK1(y, FEATURE_SUM(x.transpose(-1, -2)).transpose(-1, -2), vector.unsqueeze(-1))


def _einsum(site: LinearSite, y: Any, x: Any, vector: Any) -> Any:
    """Each axis of the output takes its axis of the feature sum, of the vector, or of both."""
    assert site.labels is not None
    of_x, of_weight, of_y = site.labels
    inputs = [label for label in of_weight if label not in of_y]
    kept = [label for label in of_x if label not in inputs]
    if kept + inputs != list(of_x):
        x = x.permute([of_x.index(label) for label in (*kept, *inputs)])
    if len(inputs) > 1:
        x = x.flatten(-len(inputs))
    s = _spread(FEATURE_SUM(x).squeeze(-1), kept, of_y)
    own = [label for label in of_weight if label in of_y]
    return ADD_RANK1(y, s, _spread(vector, own, of_y))


def _spread(tensor: Any, labels: list[str], of_y: str) -> Any:
    """A tensor with axes `labels` laid out to broadcast against the output."""
    order = sorted(labels, key=of_y.index)
    if order != labels:
        tensor = tensor.permute([labels.index(label) for label in order])
    for axis, label in enumerate(of_y):
        if label not in labels:
            tensor = tensor.unsqueeze(axis)
    return tensor


def _grouped(site: LinearSite, y: Any, x: Any, vector: Any) -> Any:
    """`vector` [experts, out_features]; the rows of x are sorted by expert and `offs` says where each one's end."""
    given = arguments(site.node)
    assert given is not None
    offs = given["offs"]
    ends: Any = fx.Proxy(offs, y.tracer)
    rows = torch.arange(x.size(0), device=ends.device)
    # Rows after the last expert's end are padding, whatever is added to them.
    expert = torch.searchsorted(ends, rows.to(ends.dtype), right=True).clamp(max=vector.size(0) - 1)
    return ADD_RANK1(y, FEATURE_SUM(x), vector.index_select(0, expert))


def _conv(site: LinearSite, y: Any, x: Any, vector: Any) -> Any:
    """`vector` [out_features]; the feature sum is that of the channels, summed over each window."""
    windows = conv_window(site.node, example(site.weight)) if site.weight is not None else None
    assert windows is not None
    window, stride = windows
    space = len(window)
    s = FEATURE_SUM(x.movedim(-1 - space, -1)).movedim(-1, -1 - space)
    if prod(window) > 1 or prod(stride) > 1:
        pool = (torch.avg_pool1d, torch.nn.functional.avg_pool2d, torch.nn.functional.avg_pool3d)[space - 1]
        s = pool(s, window, stride) * prod(window)
    for _ in window:
        vector = vector.unsqueeze(-1)
    return ADD_RANK1(y, s, vector)


def _rank(proxy: Any) -> int:
    value = example(proxy.node)
    return value.ndim if value is not None else 1


_UPDATES: dict[str, Callable[[LinearSite, Any, Any, Any], Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "left": _left,
    "einsum": _einsum,
    "grouped": _grouped,
    "conv": _conv,
}
