"""What an op multiplies with a weight, and which axes of the weight are inputs.

Each op is read by the names of its schema, scale factors included; an op that is not understood is no linear op here,
and `other_uses` names the parameters in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from onelora_compile.kinds import is_linear
from onelora_compile.passes.sites.einsum import Labels, einsum_labels, einsum_operands
from onelora_compile.passes.sites.operators import arguments, op_name
from onelora_compile.passes.sites.weight_path import Chain, example

BROADCAST = "its input has one entry along an axis of the weight, and counts for all"
IN_PLACE = "it writes into a tensor that exists, where an update can't follow"


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One use of a weight in a linear op.

    Attributes:
        kind: see `LinearSite`.
        x: the input.
        weight: the weight as the op uses it; None for a call of a submodule.
        axes: its input axes, counted from the end.
        alpha: a number, or a node of one, that scales the product.
        fixed: why an update of the weight can't become one of the output; "" if it can.
        labels: of kind "einsum", where the ranks of the operands are known.
    """

    kind: str
    x: fx.Node
    weight: fx.Node | None
    axes: tuple[int, ...]
    alpha: Any = 1
    fixed: str = ""
    labels: Labels | None = None


Chains = Mapping[fx.Node, Chain]


def use_of(gm: fx.GraphModule, node: fx.Node, chains: Chains) -> Contraction | None:
    """What the node multiplies; None for what is not a linear op, or not understood."""
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        x = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        linear = is_linear(called) or hasattr(called, "_onelora_base")
        return Contraction("module", x, None, ()) if linear and isinstance(x, fx.Node) else None
    name = op_name(node)
    plain = name.removesuffix("_") if not name.startswith("__") else name
    if name == "einsum":
        return _einsum(node, chains)
    if (read := _READERS.get(plain)) is None:
        return None
    if (given := arguments(node)) is None or (use := read(plain, given, chains)) is None:
        return None
    if use.weight is not None and use.kind != "linear" and use.weight not in chains:
        return None
    fixed = IN_PLACE if plain != name or given.get("out") is not None else use.fixed
    return dataclasses.replace(use, fixed=fixed, alpha=given.get("alpha", 1))


def _linear(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    x, weight = given["input"], given["weight"]
    if weight in chains or x not in chains:  # a weight that is computed counts too
        return Contraction("linear", x, weight, (-1,)) if _rank(weight) != 1 else None
    rank, of_x = _rank(x), _letters(_rank(weight), "i", _OF_X)
    if rank is None or rank < 2:
        return None
    of_weight = _OF_W[: rank - 1] + "i"
    labels = (of_x, of_weight, of_weight[:-1] + of_x[:-1]) if of_x is not None else None
    return Contraction("einsum", weight, x, (-1,), labels=labels)


def _matmul(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    left, right = _pair(given)
    return _product(left, right, chains)


def _reversed_matmul(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    left, right = _pair(given)
    return _product(right, left, chains)


def _pair(given: Mapping[str, Any]) -> tuple[fx.Node, fx.Node]:
    """The operands of a product: the last two tensors of its schema that have no default."""
    names = [name for name in ("self", "mat", "mat1", "batch1", "mat2", "batch2", "other", "vec") if name in given]
    left, right = names[-2:]
    return given[left], given[right]


def _product(left: fx.Node, right: fx.Node, chains: Chains) -> Contraction | None:
    """A matmul of an activation and a weight of at least two axes, on either side."""
    if (left in chains) == (right in chains):
        return None
    if right in chains:
        return Contraction("matmul", left, right, (-2,)) if _rank(right) != 1 else None
    return Contraction("left", right, left, (-1,)) if _rank(left) != 1 else None


def _addbmm(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    """All products of the batch, added."""
    left, right = given["batch1"], given["batch2"]
    if (left in chains) == (right in chains):
        return None
    if right in chains:
        return Contraction("einsum", left, right, (-3, -2), labels=("eni", "eio", "no"))
    return Contraction("einsum", right, left, (-3, -1), labels=("ein", "eoi", "on"))


def _inner(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    return _tensordot(name, {**given, "dims_self": [-1], "dims_other": [-1]}, chains)


def _tensordot(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    """Of x and W in either order; the axes of the output are those that are left of the first, then of the second."""
    first, second = given.get("a", given.get("self")), given.get("b", given.get("other"))
    if (first in chains) == (second in chains):
        return None
    if (axes := _contracted(given)) is None:
        return None
    x, weight = (first, second) if second in chains else (second, first)
    of_first, of_second = axes
    own, others = (of_second, of_first) if second in chains else (of_first, of_second)
    if (rank := _rank(weight)) is None or len(own) >= rank or not own:
        return None
    labels = None
    if (rank_x := _rank(x)) is not None:
        of_x, of_weight = list(_OF_X[:rank_x]), list(_OF_W[:rank])
        for letter, mine, other in zip(_SUMMED[: len(own)], own, others, strict=True):
            of_weight[mine], of_x[other] = letter, letter
        parts = (of_x, of_weight) if second in chains else (of_weight, of_x)
        of_y = [letter for part in parts for letter in part if letter not in _SUMMED]
        labels = ("".join(of_x), "".join(of_weight), "".join(of_y))
    assert isinstance(x, fx.Node)
    found = Contraction("einsum", x, weight, tuple(axis % rank - rank for axis in own), labels=labels)
    return dataclasses.replace(found, fixed=_broadcast(found))


def _broadcast(use: Contraction) -> str:
    """Why an einsum, or a tensordot, can't have its update moved: the sum over x would lack what x is repeated to."""
    x, weight = example(use.x), None if use.weight is None else example(use.weight)
    if use.labels is None or x is None or weight is None:
        return ""
    of_x, of_weight, _ = use.labels
    summed = [of_weight[axis] for axis in use.axes]
    repeated = [one for one in summed if x.shape[of_x.index(one)] == 1 != weight.shape[of_weight.index(one)]]
    return BROADCAST if repeated else ""


def _contracted(given: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """The axes that a tensordot sums over, of its first and of its second operand."""
    dims = (given["dims_self"], given["dims_other"]) if "dims_self" in given else given["dims"]
    if isinstance(dims, int):
        dims = (list(range(-dims, 0)), list(range(dims)))
    if not isinstance(dims, (list, tuple)) or len(dims) != 2:
        return None
    first, second = ([one] if isinstance(one, int) else one for one in dims)
    if not all(isinstance(one, (list, tuple)) for one in (first, second)) or not len(first) == len(second) < 7:
        return None
    return (list(first), list(second)) if all(isinstance(axis, int) for axis in (*first, *second)) else None


def _grouped(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    """Rows of x by expert."""
    x = given.get("input", given.get("mat_a", given.get("self")))
    weight = given.get("weight", given.get("mat_b", given.get("mat2")))
    if weight not in chains or x in chains or _rank(weight) != 3 or not isinstance(given.get("offs"), fx.Node):
        return None
    return Contraction("grouped", x, weight, (-2,)) if _rank(x) in (None, 2) else None


def _conv(name: str, given: Mapping[str, Any], chains: Chains) -> Contraction | None:
    return Contraction("conv", given["input"], given["weight"], tuple(range(-1 - int(name[4]), 0)))


def _einsum(node: fx.Node, chains: Chains) -> Contraction | None:
    if (parsed := einsum_operands(node)) is None or len(parsed[1]) != 2:
        return None
    equation, (first, second) = parsed
    if (first in chains) == (second in chains):
        return None
    x, weight = (first, second) if second in chains else (second, first)
    if (labels := einsum_labels(equation, weight is first, _rank(x), _rank(weight))) is None:
        return None
    of_x, of_weight, of_y = labels
    inputs = [label for label in of_weight if label not in of_y]
    plain = len(set(of_weight)) == len(of_weight) and len(set(of_x)) == len(of_x) and set(inputs) <= set(of_x)
    summed = set(of_x) - set(of_weight) - set(of_y)  # an axis of x that is summed away without a weight
    if not plain or not inputs or summed or not set(of_weight) - set(inputs) - set(of_x):
        return None
    axes = tuple(of_weight.index(label) - len(of_weight) for label in inputs)
    known = _rank(x) is not None or "..." not in equation
    found = Contraction("einsum", x, weight, axes, labels=labels if known else None)
    return dataclasses.replace(found, fixed=_broadcast(found))


def conv_window(node: fx.Node, weight: torch.Tensor | None) -> tuple[list[int], list[int]] | None:
    """Kernel size and stride of a convolution that is a linear map of patches; None for any other."""
    if weight is None or (given := arguments(node)) is None:
        return None
    space = weight.ndim - 2
    stride, padding, dilation = (_each(given[name], space) for name in ("stride", "padding", "dilation"))
    window = list(weight.shape[2:])
    return (window, stride) if conv_patches(window, stride, padding, dilation, given["groups"]) else None


def _each(value: Any, space: int) -> Any:
    if isinstance(value, str):
        return value
    values = [value] if isinstance(value, int) else list(value)
    return values * space if len(values) == 1 else values


def conv_patches(window: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution of these settings maps every patch of the input linearly, none of them twice."""
    padding = (0,) if padding == "valid" else padding
    whole = prod(window) == 1 or list(stride) == list(window)
    return whole and all(p == 0 for p in padding) and all(d == 1 for d in dilation) and groups == 1


def _rank(node: Any) -> int | None:
    value = example(node) if isinstance(node, fx.Node) else None
    return value.ndim if value is not None else None


_OF_X, _OF_W, _SUMMED = "abcdefgh", "opqrstuv", "ijklmn"


def _letters(rank: int | None, last: str, letters: str) -> str | None:
    return None if rank is None else letters[: rank - 1] + last


_READERS: dict[str, Callable[[str, Mapping[str, Any], Chains], Contraction | None]] = {
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "addmm", "addmv", "baddbmm"), _matmul),
    "__rmatmul__": _reversed_matmul,
    "addbmm": _addbmm,
    "inner": _inner,
    "tensordot": _tensordot,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback"), _grouped),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
}

# Ops that multiply and add over an axis: what of these is no linear site is named by `other_uses`.
CONTRACTIONS = frozenset(_READERS) | {
    *("einsum", "bilinear", "dot", "vdot", "vecdot", "multi_dot", "chain_matmul", "cdist", "_trilinear"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "_convolution", "conv_tbc"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "_addmm_activation"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("_scaled_mm", "_int_mm", "spmm", "_sparse_mm", "smm", "sspaddmm", "hspmm", "_weight_int8pack_mm"),
}
