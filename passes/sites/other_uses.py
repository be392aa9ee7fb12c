"""Parameters that are used in contractions that are not understood as linear ops: which, by what, and why.

    bilinear(x, y, W)                  a product that the method has no vector for
    linear(x, W * mask)                a weight that is computed from parameters
    x @ (A @ B)                        a product of two parameters
    mylib::linear(x, W)                an operator of another library: nobody knows what it does
    (x[:, None] * W).sum(-1)           a product and a sum, in two steps

Only looks.  What `match_linear` finds is not listed, nor is a weight that is adapted where it is read, nor a parameter
of fewer than two axes, which is no matrix.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Collection, Iterator

from torch import fx

from onelora_compile.ops import ADAPTED_WEIGHT, ADD_RANK1, RANK1_UPDATE
from onelora_compile.passes.sites.contractions import CONTRACTIONS, use_of
from onelora_compile.passes.sites.operators import is_known, op_name
from onelora_compile.passes.sites.summed_products import summed_products
from onelora_compile.passes.sites.weight_path import Chain, example, is_parameter, weight_chains

NOT_UNDERSTOOD = "used by {op}, which this package does not know as a linear op"
COMPUTED = "the weight of {op} is computed from it, so which of its axes are inputs can't be told"
UNKNOWN = "given to {op}, an operator of another library"
ASK = ": name it, with its input axis, in target_parameters if it is the weight of a linear map"

_PROPERTIES = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "is_leaf", "itemsize", "nbytes"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested"),
}
_METHODS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "data_ptr", "requires_grad_"),
}
_LIKE = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
}
_OWN = ("onelora::", "prim::", "prims::")  # namespaces whose operators are known


@dataclasses.dataclass(frozen=True)
class OtherUse:
    """A parameter in an op that is no linear site.

    Attributes:
        node: the op.
        root: the node of the parameter.
        reason: why the op is none.
    """

    node: fx.Node
    root: fx.Node
    reason: str


def other_uses(gm: fx.GraphModule, parameters: Collection[fx.Node] = ()) -> list[OtherUse]:
    """Every use of a parameter in a contraction, or in an unknown operator, that is no linear site.

    Args:
        gm: the graph.
        parameters: nodes that are parameters, besides those that can be recognised.
    """
    chains = weight_chains(gm, parameters)
    made_of = made_of_parameters(gm, parameters)
    found = [use for node in gm.graph.nodes for use in _uses(gm, node, chains, made_of)]
    for node, weight in summed_products(gm, made_of):
        reason = NOT_UNDERSTOOD if weight in chains else COMPUTED
        roots = filter(_may_be_weight, made_of[weight])
        found += [OtherUse(node, root, reason.format(op=f"mul and {op_name(node)}") + ASK) for root in roots]
    return found


def users(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every op that gets the values of a parameter, with the node of that: linear ops, a penalty, a comparison."""
    chains = weight_chains(gm)
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and node not in chains and not _tells_of_no_value(node):
            roots = (chains[operand].root for operand in node.all_input_nodes if operand in chains)
            yield from ((node, root) for root in dict.fromkeys(roots))


def _uses(
    gm: fx.GraphModule, node: fx.Node, chains: dict[fx.Node, Chain], made_of: dict[fx.Node, tuple[fx.Node, ...]]
) -> Iterator[OtherUse]:
    name = op_name(node)
    foreign = "::" in name and not name.startswith(_OWN) and name not in CONTRACTIONS
    if not foreign and name.removesuffix("_") not in CONTRACTIONS:
        return
    site = use_of(gm, node, chains)
    for operand in node.all_input_nodes:
        if operand not in made_of or (site is not None and (operand is not site.weight or operand in chains)):
            continue
        reason = UNKNOWN if foreign else NOT_UNDERSTOOD if operand in chains else COMPUTED
        for root in made_of[operand]:
            if _may_be_weight(root):
                yield OtherUse(node, root, reason.format(op=name) + ASK)


def made_of_parameters(gm: fx.GraphModule, parameters: Collection[fx.Node] = ()) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The nodes that are computed from parameters and shapes alone, with those parameters."""
    made_of: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in gm.graph.nodes:
        if node in parameters or is_parameter(node):
            made_of[node] = (node,)
        elif _tells_of_no_value(node) or node.target is ADAPTED_WEIGHT:
            made_of[node] = ()
        elif node.target in (RANK1_UPDATE, ADD_RANK1):
            continue  # the output of a linear is no weight, whatever it was given
        elif op_name(node) or (node.op == "call_function" and is_known(node.target)):
            if node.all_input_nodes and all(source in made_of for source in node.all_input_nodes):
                roots = (root for source in node.all_input_nodes for root in made_of[source])
                made_of[node] = tuple(dict.fromkeys(roots))
    return made_of


def asks_for_no_value(name: str) -> bool:
    """Whether a property or method of a tensor gives a shape, dtype or device, and nothing of its values."""
    return name in _PROPERTIES or name in _METHODS


def _tells_of_no_value(node: fx.Node) -> bool:
    if op_name(node) in _LIKE:
        return True
    if node.target is builtins.getattr:
        return node.args[1] in _PROPERTIES
    return node.op == "call_method" and node.target in _METHODS


def _may_be_weight(root: fx.Node) -> bool:
    value = example(root)
    return value is None or value.ndim > 1
