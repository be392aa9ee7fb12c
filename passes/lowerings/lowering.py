"""What a lowering is, and what it needs to know of one update.

A lowering rewrites `add_rank1(linear(x, W, c), feature_sum(x), b)` to operators that compute the same function in
another way.  It says for which updates it can (`why_not`), and what the update costs there beyond the frozen linear
(`cost`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from onelora_compile.dynamo.private_api import size_hint
from onelora_compile.passes.lowerings.neighbours import stands_beside_kernel
from onelora_compile.passes.sites.linear_site import example, operands
from onelora_compile.passes.sites.operators import arguments, op_name

LOWERING = "onelora_lowering"  # key in node.meta: the Choice of what computes an update, and the name of its y
DYNAMIC = "the size of a tensor is not known when compiling"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and types of one update: what its cost depends on, and the key of measured choices.

    Attributes:
        rows: entries of the feature sum; rounded up to a power of two where the graph is dynamic.
        in_features: columns of W.
        out_features: rows of W.
        dtype: of x, W and y.
        vector_dtype: of the vector.
        bias: whether the linear has one.
        sum_apart: x comes from a kernel that Inductor does not write, so its sum is a pass of its own.
        update_apart: y goes to such a kernel, so the update is a pass of its own.
        trains_input: whether x needs a gradient.
    """

    rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    vector_dtype: torch.dtype
    bias: bool
    sum_apart: bool
    update_apart: bool
    trains_input: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an update costs beyond the frozen linear, forward and backward: bytes moved, flops done."""

    bytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Update:
    """One `add_rank1` of a graph.

    Attributes:
        node: the update.
        y: what it changes, s: its feature sum, vector: its vector.
        linear: x, W and the bias (None: without) of the linear that computes y; None if y is no call of `linear`, or
            is used besides.
    """

    node: fx.Node
    y: fx.Node
    s: fx.Node
    vector: fx.Node
    linear: tuple[fx.Node, fx.Node, fx.Node | None] | None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        value = example(self.y)
        assert value is not None
        return value.device

    def shape(self) -> Shape | None:
        """None where the linear is not known or a width is dynamic."""
        if self.linear is None:
            return None
        x, weight, y, vector = map(example, (*self.linear[:2], self.y, self.vector))
        if x is None or weight is None or y is None or vector is None or weight.ndim != 2:
            return None
        out_features, in_features = weight.shape
        rows = size_hint(y.numel() // y.shape[-1]) if isinstance(out_features, int) and out_features else None
        if rows is None or not isinstance(in_features, int):
            return None
        if not isinstance(y.numel(), int):
            rows = 1 << max(rows - 1, 0).bit_length()
        return Shape(
            rows,
            in_features,
            out_features,
            y.dtype,
            vector.dtype,
            self.linear[2] is not None,
            stands_beside_kernel(self.linear[0], above=True),
            stands_beside_kernel(self.node, above=False),
            x.requires_grad,
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which lowering an update gets, why, and the name of the node whose output it changes."""

    name: str
    why: str
    of: str = ""


@dataclasses.dataclass(frozen=True)
class Lowering:
    """See the module.

    Attributes:
        name: what `options={"lowering": name}` and `explain` call it.
        why_not: the reason for which it can't take an update, None if it can.
        rewrite: replaces the update; returns the node that computes the new output.
        cost: what the update costs.
    """

    name: str
    why_not: Callable[[Update], str | None]
    rewrite: Callable[[fx.Graph, Update], fx.Node]
    cost: Callable[[Shape], Cost]


def update_of(node: fx.Node) -> Update:
    """What is known of an `add_rank1` node."""
    y, s, vector = operands(node)
    return Update(node, y, s, vector, _linear(y, s))


def _linear(y: fx.Node, s: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    if op_name(y) != "linear" or len(y.users) != 1:
        return None
    values = arguments(y)
    if values is None or values.get("out") is not None:
        return None
    x, weight, bias = (values.get(name) for name in ("input", "weight", "bias"))
    same = s.all_input_nodes == [x]
    if not same or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return x, weight, bias if isinstance(bias, fx.Node) else None
