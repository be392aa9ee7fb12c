"""What a lowering is, and what it needs to know of one update.

A lowering rewrites `add_rank1(linear(x, W, c), feature_sum(x), b)` to operators that compute the same function in
another way, and says for which updates it can (`why_not`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from onelora_compile.passes.sites.linear_site import operands
from onelora_compile.passes.sites.operators import arguments, op_name

LOWERING = "onelora_lowering"  # key in node.meta: the Choice of what computes an update, and the name of its y


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
    """

    name: str
    why_not: Callable[[Update], str | None]
    rewrite: Callable[[fx.Graph, Update], fx.Node]


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
