"""How often a piece of code calls modules and reads weights, by the ways through it.

The same call of the same value again is one use: exporters compute it once.  A call whose result is dropped is none: a
file does not hold it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import fx

from onelora_compile.passes.graph.writes import written
from onelora_compile.passes.sites.operators import op_name
from onelora_compile.passes.sites.other_uses import users
from onelora_compile.weight_uses.follow_forward import Followed
from onelora_compile.weight_uses.tracer import CALLED

Counts = collections.Counter[Any]  # of modules: calls; of weights: reads
_SHAPES = ("shape", "size", "dim", "ndim", "numel", "len", "device", "dtype")
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How often modules are called and weights read by some code.

    Attributes:
        least: by any way through it.
        most: and by one of them.
        constant: what is called with, or used on, constants alone by one of them.
        sized: what is called or used more often where there is more of something.
    """

    least: Mapping[Any, int]
    most: Mapping[Any, int]
    constant: Collection[Any]
    sized: Collection[Any]

    def renamed(self, name: Callable[[Any], Any]) -> Bounds:
        """By other keys; what has none, None, is left out."""
        least, most = (
            {name(one): n for one, n in own.items() if name(one) is not None} for own in (self.least, self.most)
        )
        constant, sized = ({name(one) for one in own} - {None} for own in (self.constant, self.sized))
        return Bounds(least, most, constant, sized)


def bounds(ways: Sequence[Followed]) -> Bounds:
    """What the ways through some code have in common, and what one of them has."""
    counts = [(way, _counts(way)) for way in ways]
    plain = [(way, one) for way, one in counts if way.size == 1]
    whole = [one for way, one in plain if not way.error] or [one for _, one in plain]
    sized: set[Any] = set()
    for (_, few), (way, many) in itertools.pairwise(counts):
        if way.size > 1 and not way.error:
            sized |= {one for one in few.keys() | many.keys() if few[one] != many[one]}
    constant = set[Any]().union(*map(_on_constants, ways)) if sized else set()
    return Bounds(functools.reduce(operator.and_, whole), functools.reduce(operator.or_, whole), constant, sized)


def _on_constants(way: Followed) -> set[Any]:
    """The modules that are called with constants alone, and the weights that are used on them."""
    hang: set[fx.Node] = set()  # on values
    found: set[Any] = set()
    weights = {node: held for node, root in users(way.gm) if (held := way.held.get(str(root.target))) is not None}
    for node in way.gm.graph.nodes:
        name = op_name(node) or str(node.target)
        if node.op == "placeholder" or any(word in name for word in _RANDOM):
            hang.add(node)
        elif any(one in hang for one in node.all_input_nodes) and not _of_a_shape(node, name):
            hang.add(node)
        elif CALLED in node.meta:
            found.add(node.meta[CALLED])
        elif node in weights:
            found.add(weights[node])
    return found


def _of_a_shape(node: fx.Node, name: str) -> bool:
    """Whether a value goes by the shape of another alone."""
    return (
        name in _SHAPES
        or name.startswith("new_")
        or name.endswith("_like")
        or (node.target is getattr and node.args[1] in _SHAPES)
    )


def _counts(way: Followed) -> Counts:
    live = set(way.gm.graph.nodes) if way.error else _live(way.gm)
    numbers = _numbers(way.gm)
    calls = {(numbers[node], node.meta[CALLED]) for node in live if CALLED in node.meta}
    reads = {
        (numbers[node], held)
        for node, root in users(way.gm)
        if node in live and (held := way.held.get(str(root.target))) is not None
    }
    return collections.Counter(one for _, one in (*calls, *reads))


def _live(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that the result is made of, with what was written into these."""
    live: set[fx.Node] = set()
    left = list(gm.graph.find_nodes(op="output"))
    while left:
        node = left.pop()
        if node not in live:
            live.add(node)
            left += [*node.all_input_nodes, *(user for user in node.users if written(gm, user) is node)]
    return live


def _numbers(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The nodes by their values: what computes the same of the same has the same number."""
    numbers: dict[fx.Node, int] = {}
    known: dict[str, int] = {}

    def shown(node: fx.Node) -> str:
        return f"%{numbers[node]}"

    for place, node in enumerate(gm.graph.nodes):
        name = op_name(node) or str(node.target)
        what = id(node.meta[CALLED]) if CALLED in node.meta else (name, node.target)
        key = str((node.op, what, fx.node.map_arg((node.args, node.kwargs), shown)))
        if (into := written(gm, node)) is not None or any(word in name for word in _RANDOM):
            key = f"{place}"
        elif node.target is getattr and node.args[1] in ("dtype", "device"):
            key = str(node.args[1])  # of all values the same, as far as a use goes by it
        numbers[node] = known.setdefault(key, place)
        if into is not None:
            numbers[into] = place
    return numbers
