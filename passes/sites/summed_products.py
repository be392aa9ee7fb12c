"""A contraction in two steps: the product of a weight and an input, added up over an axis of the weight.

    (x[:, None] * W).sum(-1)                       is linear(x, W)
    stack([(x * row).sum(-1) for row in W], -1)    too
    (x * W).sum(0)                                 is none, where the first axis is the batch

Only looks: a product of two values is too little to tell which axes of W are inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from onelora_compile.passes.sites.operators import op_name
from onelora_compile.passes.sites.weight_path import example

_PRODUCTS = ("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__")
_SUMS = ("sum", "mean")
_CASTS = ("to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "_to_copy")


def summed_products(
    gm: fx.GraphModule, made_of: Mapping[fx.Node, Sequence[fx.Node]]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The sums over an axis of something that is made of parameters alone and was multiplied by a value, with it.

    Args:
        gm: the graph.
        made_of: what is computed from parameters and shapes alone, with those parameters.
    """
    for node in gm.graph.nodes:
        if not _is_product(node):
            continue
        weights = [one for one in node.all_input_nodes if made_of.get(one)]
        values = [one for one in node.all_input_nodes if one not in made_of]
        if len(weights) == len(values) == 1 and any(_is_matrix(root) for root in made_of[weights[0]]):
            yield from ((added, weights[0]) for added in _sums(node) if _adds_up(added, node, weights[0]))


def _is_product(node: fx.Node) -> bool:
    return node.target in (operator.mul, operator.imul) or op_name(node) in _PRODUCTS


def _sums(product: fx.Node) -> Iterator[fx.Node]:
    """The sums of a product, and of a cast of it."""
    for user in product.users:
        if op_name(user) in _SUMS:
            yield user
        elif op_name(user) in _CASTS:
            yield from _sums(user)


def _adds_up(added: fx.Node, product: fx.Node, weight: fx.Node) -> bool:
    """Whether a sum runs over an axis along which the weight has several numbers."""
    dims: Any = added.kwargs.get("dim", added.kwargs.get("axis", added.args[1] if len(added.args) > 1 else None))
    known, result = example(weight), example(product)
    if dims is None or dims in ((), []) or known is None:
        return True
    sizes, rank = known.shape, None if result is None else result.ndim
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    return any(sizes[axis] > 1 for dim in dims if isinstance(dim, int) for axis in _axes(dim, rank, len(sizes)))


def _axes(dim: int, rank: int | None, own: int) -> Iterator[int]:
    """The axes of the weight that an axis of the product may be, counted from the end."""
    if dim >= 0 and rank is None:
        yield from range(-own, min(dim + 1, own) - own if dim else -own)  # the first is taken for the batch's
    elif -own <= (axis := dim if dim < 0 or rank is None else dim - rank) < 0:
        yield axis


def _is_matrix(root: fx.Node) -> bool:
    """Whether a parameter has two axes and more with several numbers; one whose shape is unknown may."""
    value = example(root)
    return value is None or sum(size > 1 for size in value.shape) > 1
