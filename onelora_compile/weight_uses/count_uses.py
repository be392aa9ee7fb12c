"""How often one forward of a model uses each weight, from the ways through the code of its modules.

    a module's code calls `block` twice, `block` calls its linear once      two uses
    the same call of the same value again, or one whose result is dropped   none more: a file does not hold it

At least: whatever the arguments and values are.  At most: for the ways that were followed.  Code that was not followed
calls each child once.  A weight that is used in a loop whose length only values tell, and also on constants alone, has
no count at all: a tool that computes the constants leaves a file with one use less, and nobody can tell.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from onelora_compile.passes.graph.writes import written
from onelora_compile.passes.sites.operators import op_name
from onelora_compile.passes.sites.other_uses import users
from onelora_compile.weight_uses.follow_forward import Followed
from onelora_compile.weight_uses.tracer import CALLED

Weight = tuple[nn.Module, str]
Counts = collections.Counter[Any]  # of modules: calls; of weights: reads
_SHAPES = ("shape", "size", "dim", "ndim", "numel", "len", "device", "dtype")
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")


class UseCounter:
    """Collects what each module does."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._least: dict[nn.Module, Counts] = {}
        self._most: dict[nn.Module, Counts] = {}
        self._constant: set[tuple[nn.Module, Any]] = set()  # who uses what
        self._sized: set[tuple[nn.Module, Any]] = set()
        self._known: set[nn.Module] = set()  # whose code was followed to its end

    def add(self, module: nn.Module, bounds: Bounds, known: bool) -> None:
        """Note how often the code of a module calls others and reads weights; several pieces of code add up.

        Args:
            module: whose code.
            bounds: how often by the ways through it.
            known: whether some way came to the end.
        """
        self._known |= {module} if known else set()
        self._least.setdefault(module, collections.Counter()).update(bounds.least)
        self._most.setdefault(module, collections.Counter()).update(bounds.most)
        self._constant |= {(module, one) for one in bounds.constant}
        self._sized |= {(module, one) for one in bounds.sized}

    def followed(self) -> list[tuple[nn.Module, bool]]:
        """Whose code was followed, and whether to its end."""
        return [(module, module in self._known) for module in self._least]

    def add_uncounted(self, module: nn.Module) -> None:
        """Note that nobody can tell how often the code of a module uses what is inside it, and on what."""
        for one in module.modules():
            marks = {(module, one), *((module, (one, name)) for name in one._parameters)}
            self._constant |= marks
            self._sized |= marks

    def shared(self) -> Iterator[Shared]:
        """Modules that several others call, where following these together tells whether with the same."""
        users = _users(self._most)
        for module, callers in [*users.items()]:
            if not isinstance(module, nn.Module) or len(callers) < 2:
                continue
            ways = [self._way_to(user) for user in callers]
            root = next(one for one in ways[0] if all(one in way for way in ways))
            between = {one for way in ways for one in way[: way.index(root)]}
            if all({*between, root}.issuperset(users[one]) for one in between):
                yield Shared(module, [*callers], root, between)

    def _way_to(self, module: nn.Module) -> list[nn.Module]:
        """The module and those around it."""
        way = [module]
        while way[-1] in self._parents:
            way.append(self._parents[way[-1]])
        return way

    def add_shared(self, shared: Shared, bounds: Bounds) -> None:
        """Take the calls of a shared module from the ways through all that call it."""
        for counts, found in ((self._least, bounds.least), (self._most, bounds.most)):
            for user in shared.users:
                counts[user].pop(shared.module, None)
            counts[shared.root][shared.module] = found.get(shared.module, 0)

    def times(self, called: Collection[nn.Module], weights: Collection[Weight]) -> dict[Weight, tuple[int, int]]:
        """The uses of the weights, at least and at most, where that is not once; of what nothing uses (0, 0).

        Of one that has no count the most is 0, and the least 1 or more.

        Args:
            called: linears whose calls are uses of their `weight`.
            weights: which to tell of.
        """
        least, most = self._times(self._least, called, weights), self._times(self._most, called, weights)
        constant, sized = self._marked(self._constant, called), self._marked(self._sized, called)
        found = {weight: (max(1, least[weight]), times) for weight, times in most.items() if times > 1}
        found |= {weight: (0, 0) for weight, times in most.items() if not times}
        return found | {
            weight: (max(1, least[weight]), 0)
            for weight, times in most.items()
            if times and constant(weight) and sized(weight)
        }

    def _marked(self, marks: set[tuple[nn.Module, Any]], called: Collection[nn.Module]) -> Callable[[Weight], bool]:
        """Tells whether some way to a weight has a mark."""
        users = _users(self._most)
        for user, one in marks:
            users[one].setdefault(user, 0)
        known: dict[nn.Module, bool] = {self._model: False}

        def by(one: Any) -> bool:
            return any((user, one) in marks or of(user) for user in users[one])

        def of(module: nn.Module) -> bool:
            if module not in known:
                known[module] = False  # while it is looked at
                known[module] = by(module) if users[module] else of(self._parents.get(module, self._model))
            return known[module]

        return lambda weight: by(weight) or (weight[0] in called and weight[1] == "weight" and of(weight[0]))

    def called(self, linears: Collection[nn.Module]) -> set[nn.Module]:
        """The linears that some way through the model calls."""
        runs = self._runs(_users(self._most))
        return {module for module in linears if runs(module)}

    def _times(
        self, counts: dict[nn.Module, Counts], called: Collection[nn.Module], weights: Collection[Weight]
    ) -> dict[Weight, int]:
        users = _users(counts)
        of = self._runs(users)
        found: dict[Weight, int] = {}
        for module, name in weights:
            reads = sum(of(user) * times for user, times in users[module, name].items())
            found[module, name] = reads + (of(module) if module in called and name == "weight" else 0)
        return found

    def _runs(self, users: Mapping[Any, dict[nn.Module, int]]) -> Callable[[nn.Module], int]:
        """Tells how often a module runs."""
        runs: dict[nn.Module, int] = {}

        def of(module: nn.Module) -> int:
            if module is self._model:
                return 1
            if module not in runs:
                runs[module] = 1  # while it is looked at, for a module that calls itself
                parent = self._parents.get(module, self._model)
                calls = sum(of(user) * times for user, times in users[module].items())
                uncalled = parent in self._known and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
                runs[module] = calls if calls or uncalled else of(parent)
            return runs[module]

        return of


def _users(counts: Mapping[nn.Module, Counts]) -> dict[Any, dict[nn.Module, int]]:
    """Who uses a module or a weight, and how often."""
    users: dict[Any, dict[nn.Module, int]] = collections.defaultdict(dict)
    for user, own in counts.items():
        for one, times in own.items():
            users[one][user] = times
    return users


@dataclasses.dataclass(frozen=True)
class Shared:
    """A module that several others call.

    Attributes:
        module: it.
        users: the others.
        root: the innermost module around all of them.
        between: the users and what is around them inside the root.
    """

    module: nn.Module
    users: Sequence[nn.Module]
    root: nn.Module
    between: Collection[nn.Module]


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
