"""How often one forward of a model uses each weight, from the ways through the code of its modules.

    a module's code calls `block` twice, `block` calls its linear once      two uses
    the same call of the same value again, or one whose result is dropped   none more: a file does not hold it

At least: whatever the arguments and values are.  At most: for the ways that were followed.  Code that was not followed
calls each child once.
"""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn

from onelora_compile.adapting.follow_forward import Followed
from onelora_compile.adapting.tracer import CALLED
from onelora_compile.passes.graph.writes import written
from onelora_compile.passes.sites.operators import op_name
from onelora_compile.passes.sites.other_uses import users

Weight = tuple[nn.Module, str]
Counts = collections.Counter[Any]  # of modules: calls; of weights: reads
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")


class UseCounter:
    """Collects what each module does."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._least: dict[nn.Module, Counts] = {}
        self._most: dict[nn.Module, Counts] = {}
        self._known: set[nn.Module] = set()  # whose code was followed to its end

    def add(self, module: nn.Module, least: Mapping[Any, int], most: Mapping[Any, int], known: bool) -> None:
        """Note how often the code of a module calls others and reads weights; several pieces of code add up.

        Args:
            module: whose code.
            least: how often by any way through it.
            most: and by one of them.
            known: whether some way came to the end.
        """
        self._known |= {module} if known else set()
        self._least.setdefault(module, collections.Counter()).update(least)
        self._most.setdefault(module, collections.Counter()).update(most)

    def times(self, called: Collection[nn.Module], weights: Collection[Weight]) -> dict[Weight, tuple[int, int]]:
        """The uses of the weights, at least and at most, where the most is not one; of one without any: (1, 0).

        Args:
            called: linears whose calls are uses of their `weight`.
            weights: which to tell of.
        """
        least, most = self._times(self._least, called, weights), self._times(self._most, called, weights)
        return {weight: (max(1, least[weight]), times) for weight, times in most.items() if times != 1}

    def _times(
        self, counts: dict[nn.Module, Counts], called: Collection[nn.Module], weights: Collection[Weight]
    ) -> dict[Weight, int]:
        users: dict[Any, list[tuple[nn.Module, int]]] = collections.defaultdict(list)
        for user, own in counts.items():
            for one, times in own.items():
                users[one].append((user, times))
        runs: dict[nn.Module, int] = {}

        def of(module: nn.Module) -> int:
            """How often a module runs."""
            if module is self._model:
                return 1
            if module not in runs:
                runs[module] = 1  # while it is looked at, for a module that calls itself
                parent = self._parents.get(module, self._model)
                calls = sum(of(user) * times for user, times in users[module])
                uncalled = parent in self._known and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
                runs[module] = calls if calls or uncalled else of(parent)
            return runs[module]

        found: dict[Weight, int] = {}
        for module, name in weights:
            reads = sum(of(user) * times for user, times in users[module, name])
            found[module, name] = reads + (of(module) if module in called and name == "weight" else 0)
        return found


def bounds(ways: Sequence[Followed]) -> tuple[Counts, Counts]:
    """How often modules are called and weights read, by one way at least, and at most."""
    counts = [(not way.error, _counts(way)) for way in ways]
    whole = [one for ended, one in counts if ended] or [one for _, one in counts]
    return functools.reduce(operator.and_, whole), functools.reduce(operator.or_, (one for _, one in counts))


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
        numbers[node] = known.setdefault(key, place)
        if into is not None:
            numbers[into] = place
    return numbers
