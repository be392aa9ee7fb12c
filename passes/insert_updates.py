"""Adapt linear ops of a graph: give each a rank-1 update with a vector that is a new graph input.

    y = linear(x, W, c)    ->   y = onelora::rank1_update(linear(x, W, c), x, vector)
    y = op(x, views(W))    ->   y = op(x, views(onelora::adapted_weight(W, vector)))

The first form is for ops that take W as it is stored, the second for all others: transposed and sliced weights, weights
that are used both ways, weights on the left, experts, einsum, convolutions.  `weight_to_activation` moves it behind the
op where that is exact.

The vectors are inputs, not constants, so their values can change without a new compilation.  Leaves alone (1) a
site that is adapted already, (2) a site that `vectors` does not name, (3) a weight that other sites use under another
name, or without one, other than as it is stored, (4) a view that mixes input and output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from onelora_compile.errors import PassError
from onelora_compile.ops import ADAPTED_WEIGHT, RANK1_UPDATE
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.sites.linear_site import LinearSite, example, match_linear, plain_path
from onelora_compile.passes.sites.weight_path import input_axes

ADAPTED = "adapted already"
NOT_NAMED = "no vector of this name was given"
SHARED = "its weight has other uses, which have another vector or none"
NO_SITE = "no linear op of the graph has this name"
MIXED = "a view of the weight mixes input and output features"


def insert_rank1(
    gm: fx.GraphModule, vectors: Mapping[str, Tensor], name_of: Callable[[LinearSite], str] | None = None
) -> tuple[PassResult, list[str]]:
    """Insert an update at every site that has a vector.

    Args:
        gm: changed in place.
        vectors: by the name that `name_of` gives a site: [out_features], or the axes of a stored weight that are not
            its inputs.
        name_of: names a site; the default is what `onelora.vectors` calls it: the path of the linear module that made
            the call, else of the parameter that is read.

    Returns:
        The result, and the names of the vectors in the order in which they were appended to the graph's inputs.

    Raises:
        PassError: a vector does not have the shape that its weight needs; the graph flattens its inputs.

    Example:
        >>> import torch
        >>> gm = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> result, inputs = insert_rank1(gm, {"0": torch.ones(3)})
        >>> gm.recompile() and None
        >>> x, y = torch.ones(1, 4), gm(torch.ones(1, 4), torch.zeros(3))
        >>> bool(torch.allclose(gm(x, torch.ones(3)), y + 4))
        True
    """
    _refuse_flattening(gm)
    result = PassResult("insert_rank1")
    inputs: dict[str, fx.Node] = {}
    updated: dict[fx.Node, fx.Node] = {}  # a linear op -> what its users read now
    sites = match_linear(gm)
    names = {site.node: (name_of or default_name)(site) for site in sites}
    turned = _turned(sites)
    for site in sites:
        name = names[site.node]
        if reason := _why_not(site, name, vectors):
            result.skips[name or site.node.name] = reason
            continue
        vector = vectors[name]
        axes = turned.get(site.chain.root) if site.chain is not None else None
        by_output = axes is None and _takes_stored_weight(site, vector)
        dims = () if by_output else axes or _input_dims(site)
        if not by_output and (dims is None or not _has_one_name(site, sites, names)):
            result.skips[name] = MIXED if dims is None else SHARED
            continue
        if name not in inputs:  # a module that is called twice has one vector
            inputs[name] = _add_input(gm.graph, site.node, name, vector)
        if by_output:
            updated[site.node] = _update(gm.graph, site, updated.get(site.x, site.x), inputs[name])
        else:
            assert site.chain is not None
            _adapt_weight(gm.graph, site.chain.root, inputs[name], name, vector, dims or ())
        result.rewrites.append(name)
    unused = (name for name in vectors if name not in inputs and name not in result.skips)
    result.skips |= dict.fromkeys(unused, NO_SITE)
    return result, list(inputs)


def _refuse_flattening(gm: fx.GraphModule) -> None:
    """What flattens the arguments of a call knows how many there are: further inputs are refused at the call."""
    if isinstance(gm.graph._codegen, fx.graph._PyTreeCodeGen):
        raise PassError(
            f"insert_rank1: {type(gm).__name__} flattens its arguments, as what torch.export and tracing with "
            "concrete_args give does, and would take no vectors: give it a graph with plain inputs, or call "
            "onelora.adapt on the module before it is captured"
        )


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
    _adapt_weight(gm.graph, weight, node, weight.name, vector, dims)
    return node


def default_name(site: LinearSite) -> str:
    """What `onelora.vectors` calls the vector of a site, as far as the graph tells."""
    root = site.chain.root if site.chain is not None else None
    path = _parameter_path(root) if root is not None else ""
    if not path or _is_linear_call(site.node):
        return site.module
    owner, _, parameter = path.rpartition(".")
    return owner if parameter == "weight" else path


def _parameter_path(root: fx.Node) -> str:
    if root.op == "get_attr":
        return str(root.target)
    source: Any = getattr(root, "_dynamo_source", None)
    if source is None:
        return ""
    text = source.name() if callable(source.name) else source.name  # a method in some releases of torch
    return plain_path(text)


def _is_linear_call(node: fx.Node) -> bool:
    """Whether a linear module made the node, whosever its weight is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    made_by = stack[-1][1] if stack else None
    if isinstance(made_by, type):
        return issubclass(made_by, nn.Linear) or made_by.__name__ == "Conv1D"
    return str(made_by).endswith(("Linear", "Conv1D"))


def _why_not(site: LinearSite, name: str, vectors: Mapping[str, Tensor]) -> str | None:
    if site.vector is not None:
        return ADAPTED
    return None if name in vectors else NOT_NAMED


def _takes_stored_weight(site: LinearSite, vector: Tensor) -> bool:
    """Whether the op is x W, in either layout, of the weight as it is stored, and nothing scales it."""
    stored = site.chain is None or not site.chain.nodes
    scaled = site.fixed or isinstance(site.alpha, fx.Node) or site.alpha != 1
    return site.kind in ("module", "linear", "matmul") and stored and vector.ndim == 1 and not scaled


def _input_dims(site: LinearSite) -> tuple[int, ...] | None:
    if site.chain is None or (weight := _stored(site.chain.root)) is None:
        return None
    return input_axes(site.chain, weight.shape, site.axes)


def _turned(sites: Sequence[LinearSite]) -> dict[fx.Node, tuple[int, ...]]:
    """Weights that are used both as W and as its transpose, with the input axes of W: those of the module's call.

    Their vector is W's, so the other use gets W + vector 1ᵀ too, turned, and no update of its own.
    """
    uses: dict[fx.Node, list[tuple[LinearSite, tuple[int, ...]]]] = {}
    for site in sites:
        if site.chain is not None and (dims := _input_dims(site)) is not None:
            uses.setdefault(site.chain.root, []).append((site, dims))
    found = {}
    for root, own in uses.items():
        if len({dims for _, dims in own}) > 1:
            found[root] = next((dims for site, dims in own if _is_linear_call(site.node)), own[0][1])
    return found


def _has_one_name(site: LinearSite, sites: Sequence[LinearSite], names: Mapping[fx.Node, str]) -> bool:
    assert site.chain is not None
    same = {names[one.node] for one in sites if one.chain is not None and one.chain.root is site.chain.root}
    return len(same) == 1


def _stored(root: fx.Node) -> Tensor | None:
    held: Any = example(root)
    if held is None and root.op == "get_attr":
        held = root.graph.owning_module
        for part in str(root.target).split("."):
            held = getattr(held, part, None)
    return held if isinstance(held, Tensor) else None


def _add_input(graph: fx.Graph, beside: fx.Node, name: str, vector: Tensor) -> fx.Node:
    last = max((node for node in graph.nodes if node.op == "placeholder"), default=None)
    with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder("onelora_vector_" + name.replace(".", "_"))
    if (y := example(beside)) is not None:
        fake_mode = getattr(y, "fake_mode", None)
        node.meta["example_value"] = fake_mode.from_tensor(vector) if fake_mode is not None else vector
    return node


def _update(graph: fx.Graph, site: LinearSite, x: fx.Node, vector: fx.Node) -> fx.Node:
    with graph.inserting_after(site.node):
        update = graph.call_function(RANK1_UPDATE, (site.node, x, vector))
    update.meta = site.node.meta.copy()
    site.node.replace_all_uses_with(update, delete_user_cb=lambda user: user is not update)
    return update


def _adapt_weight(
    graph: fx.Graph, weight: fx.Node, vector: fx.Node, name: str, value: Tensor, dims: Sequence[int]
) -> None:
    """Put W + vector 1ᵀ in the place of W, once."""
    if any(user.target is ADAPTED_WEIGHT for user in weight.users):
        return
    stored = _stored(weight)
    expected = [size for axis, size in enumerate(stored.shape) if axis not in dims] if stored is not None else None
    if expected is not None and list(value.shape) != expected:
        raise PassError(f"the vector {name!r} has shape {list(value.shape)}; its weight needs {expected}")
    with graph.inserting_after(max(weight, vector)):
        adapted = graph.call_function(ADAPTED_WEIGHT, (weight, vector, list(dims)))
    adapted.meta = weight.meta.copy()
    weight.replace_all_uses_with(adapted, delete_user_cb=lambda user: user is not adapted)
