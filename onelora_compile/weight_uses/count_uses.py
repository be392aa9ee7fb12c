"""How often one forward of a model uses each weight, from the ways through the code of its modules.

    a module's code calls `block` twice, `block` calls its linear once      two uses

At least: whatever the arguments and values are.  At most: for the ways that were followed.  Code that was not followed
calls each child once.  A weight that is used in a loop whose length only values tell, and also on constants alone, has
no count at all: a tool that computes the constants leaves a file with one use less, and nobody can tell.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from onelora_compile.weight_uses.count_in_code import Bounds, Counts

WeightName = tuple[nn.Module, str]


class UseCounter:
    """Collects what each module does."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._least: dict[nn.Module, Counts] = {}
        self._most: dict[nn.Module, Counts] = {}
        self._constant: set[tuple[nn.Module, Any]] = set()  # who uses what
        self._sized: set[tuple[nn.Module, Any]] = set()
        self._unbounded: set[tuple[nn.Module, Any]] = set()
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

    def add_unbounded(self, module: nn.Module) -> None:
        """Note that the code of a module may use what is inside it more often than the ways that were followed."""
        for one in module.modules():
            self._unbounded |= {(module, one), *((module, (one, name)) for name in one._parameters)}

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

    def times(
        self, called: Collection[nn.Module], weights: Collection[WeightName]
    ) -> dict[WeightName, tuple[int, int]]:
        """The uses of the weights, at least and at most, where that is not once; of what nothing uses (0, 0).

        Of one that has no count the most is 0, and the least 1 or more.  The most is negative where it bounds nothing:
        in a loop whose length only values tell, and in code that was not followed to its end.

        Args:
            called: linears whose calls are uses of their `weight`.
            weights: which to tell of.
        """
        least, most = self._times(self._least, called, weights), self._times(self._most, called, weights)
        constant, sized = self._marked(self._constant, called), self._marked(self._sized, called)
        found = {weight: (max(1, least[weight]), times) for weight, times in most.items() if times > 1}
        unbounded = self._marked(self._sized | self._unbounded, called)
        loose = ((weight, times) for weight, times in most.items() if times and unbounded(weight))
        found |= {weight: (max(1, least[weight]), -times) for weight, times in loose}
        found |= {weight: (0, 0) for weight, times in most.items() if not times}
        return found | {
            weight: (max(1, least[weight]), 0)
            for weight, times in most.items()
            if times and constant(weight) and sized(weight)
        }

    def _marked(self, marks: set[tuple[nn.Module, Any]], called: Collection[nn.Module]) -> Callable[[WeightName], bool]:
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
        self, counts: dict[nn.Module, Counts], called: Collection[nn.Module], weights: Collection[WeightName]
    ) -> dict[WeightName, int]:
        users = _users(counts)
        of = self._runs(users)
        found: dict[WeightName, int] = {}
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
