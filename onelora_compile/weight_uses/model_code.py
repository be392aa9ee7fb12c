"""The code of a model's modules, followed on its own and without inputs: what it reads, and what it calls how often."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from onelora_compile.kinds import is_plain
from onelora_compile.looking.untouched import Kept, silently
from onelora_compile.weight_uses.count_in_code import Bounds, bounds
from onelora_compile.weight_uses.count_uses import UseCounter
from onelora_compile.weight_uses.entries import Entry, entries, hooks_of
from onelora_compile.weight_uses.follow_forward import Followed, follow
from onelora_compile.weight_uses.holders import Holders, References, held_in, of_torch
from onelora_compile.weight_uses.other_weights import OtherWeights
from onelora_compile.weight_uses.reachable_names import NamesOfCode, modules_elsewhere, names_in_reach
from onelora_compile.weight_uses.replaced_functions import both_branches, not_entered
from onelora_compile.weight_uses.weight_reads import (
    NOT_FOLLOWED,
    READ,
    REPLACED,
    SCRIPTED,
    WRITTEN,
    DirectRead,
    reads_of,
)

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
# `forward`: of a class, nn.Linear.forward(self.child, x), is no call of the child.
_CALLS_WITH = {"functional_call", "_functional_call"}
_OF_PARAMETERS = _CALLS_WITH | {
    *("weight", "_parameters", "parameters", "named_parameters", "get_parameter", "state_dict", "forward"),
}
# Of torch.func and torch.autograd.forward_ad: a function is run on values and on tangents, which may be constants, so
# that uses under one have no count.
_DERIVATIVES = {"jvp", "vjp", "jacfwd", "jacrev", "hessian", "linearize", "grad", "grad_and_value"}
_DUAL = "make_dual"
# What each `if` on a value goes by, and a loop on one: all by the same, or by another after the first ones, as in the
# branches of `elif`.
_NO, _YES = (False,), (True,)
_TURNS = [(one * count + other, 1) for count in (1, 2, 3) for one, other in ((_NO, _YES), (_YES, _NO))]
_ANSWERS = [(_NO, 1), (_NO, 2), (_YES, 1)]
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class ModelCode:
    """Follows the code of a model's modules that could read a weight or call a linear."""

    def __init__(self, model: nn.Module, called: Collection[nn.Module]) -> None:
        self._model = model
        self._called = called
        self._names: NamesOfCode = {}
        self._leading = _OF_PARAMETERS | _names_of_weights(model)
        self._holders = Holders(model)
        self._references = References(self._holders)
        self._counted: dict[Any, list[tuple[Bounds, bool, bool]]] = {}
        self._counter = UseCounter(model)
        self._writing: dict[type[nn.Module], bool] = {}
        self._elsewhere = OtherWeights(model)
        self.others: dict[tuple[nn.Module, str], str] = {}

    def reads(self, module: nn.Module) -> Iterator[DirectRead]:
        """What the code of one module reads, without that of its children."""
        if isinstance(module, nn.MultiheadAttention):
            # Known: torch/nn/modules/activation.py hands them to one function.
            packed = (name for name in _PACKED if module._parameters.get(name) is not None)
            yield from (DirectRead(module, name, (1,)) for name in packed)
            yield DirectRead(module.out_proj, "weight", (1,), own=False)
        elif isinstance(module, torch.jit.ScriptModule):
            yield from (DirectRead(module, name, None, why=SCRIPTED) for name in _matrices(module))
        elif self._may_read(module) or (self._inside(module) and (_holds_weights(module) or modules_elsewhere(module))):
            yield from self._followed(module)
        elif not self._inside(module):
            if not of_torch(module) and self._writes(module):
                yield DirectRead(module, "weight", None, why=WRITTEN)
        elif type(module) is nn.Sequential:
            once = dict.fromkeys(module.children(), 1)
            self._counter.add(module, Bounds(once, once, (), ()), known=True)
        elif not of_torch(module) and any(one in self._called for one in module.modules()):
            yield from self._count_calls(module)
        elif not of_torch(module) and self._elsewhere.held_by(module):
            collections.deque(self._ways(module, (False,)), maxlen=0)  # notes the others

    def times(self) -> dict[tuple[nn.Module, str], tuple[int, int]]:
        """How often one forward uses each weight, at least and at most, where that is not once."""
        for module, known in self._counter.followed():
            named = names_in_reach(module, self._names)
            # Functions of torch.func take no stand-ins for values, so that their names alone tell nothing.
            if _DUAL in named or not (known or _DERIVATIVES.isdisjoint(named)):
                self._counter.add_uncounted(module)
            elif not known:
                self._counter.add_unbounded(module)
        for shared in self._counter.shared():
            ways = [way for _, own in self._ways(shared.root, (False,), shared.between) for _, way in own]
            if any(not way.error for way in ways):
                self._counter.add_shared(shared, bounds(ways))
        weights = {(module, name) for module in self._model.modules() for name in _matrices(module)}
        return self._counter.times(self._called, weights | {(module, "weight") for module in self._called})

    def calls(self) -> set[nn.Module]:
        """The linears that one forward calls."""
        return self._counter.called(self._called)

    def _inside(self, module: nn.Module) -> bool:
        """Whether what the forward of a module does with its own weight is not known."""
        return module not in self._called or _holds_more(module)

    def _may_read(self, module: nn.Module) -> bool:
        """Whether code that a call of the module runs names the weight of a module, or refers to a parameter."""
        if hooks_of(module):
            return True
        refers, holds = self._references.of(module)
        kind: Any = type(module)
        alone = next(module.children(), None) is None and kind.__call__ is nn.Module.__call__
        if holds or (alone and not refers):
            return holds
        return not self._leading.isdisjoint(names_in_reach(module, self._names))

    def _followed(self, module: nn.Module) -> Iterator[DirectRead]:
        modes = (False, True) if "training" in names_in_reach(module, self._names) else (False,)
        for entry, ways in self._ways(module, modes):
            inside = not entry.forward or self._inside(module)
            for read in (read for _, way in ways for read in reads_of(way)):
                if inside or read.why == WRITTEN:
                    yield dataclasses.replace(read, own=entry.forward)
            if not inside:
                continue  # how it uses its own weight is known
            # How often is asked where a model is used.
            known = any(not way.error for _, way in ways)
            self._counter.add(module, bounds([way for training, way in ways if not training]), known)
            if not known:
                yield from self._not_followed(module, ways[0][1].error)

    def _writes(self, module: nn.Module) -> bool:
        """Whether the forward of a linear writes to its weight; linears of one class are taken for alike."""
        kind = type(module)
        if kind not in self._writing:
            ways = (way for _, ways in self._ways(module, (False,)) for _, way in ways)
            self._writing[kind] = any(read.why == WRITTEN for way in ways for read in reads_of(way))
        return self._writing[kind]

    def _count_calls(self, module: nn.Module) -> Iterator[DirectRead]:
        """Of a module that reads nothing; modules of one class that differ in numbers alone are taken for alike."""
        fields = ((name, value) for name, value in vars(module).items() if type(value) in (bool, str, type(None)))
        names = {child: name for name, child in module.named_modules()}
        key = (type(module), *fields, *((name, type(child)) for child, name in names.items()))
        if key not in self._counted:
            self._counted[key] = []
            before = len(self.others)
            for _, ways in self._ways(module, (False,)):
                found = bounds([way for _, way in ways]).renamed(names.get)
                known = any(not way.error for _, way in ways)
                reads = len(self.others) > before or any(True for _, way in ways for _ in reads_of(way))
                self._counted[key].append((found, known, reads))
        if any(reads for *_, reads in self._counted[key]):  # through what it gives to others
            yield from self._followed(module)
            return
        inner = module.get_submodule
        for found, known, _ in self._counted[key]:
            self._counter.add(module, found.renamed(inner), known)

    def _ways(
        self, module: nn.Module, modes: Sequence[bool], entered: Collection[nn.Module] = ()
    ) -> Iterator[tuple[Entry, list[tuple[bool, Followed]]]]:
        """The code that a call of a module runs, with the ways through it, and some submodules, in each mode."""
        kept = Kept(module, instead={torch.jit.ScriptFunction: not_entered, torch.cond: both_branches})
        inside = held_in(module)
        tried = [
            *_ANSWERS,
            *(_TURNS if _holds_weights(module) else ()),
        ]  # these cost time: where they may find a weight
        for entry in entries(module):
            if entry.forward and of_torch(module) and "forward" not in vars(module):
                continue
            ways: list[tuple[bool, Followed]] = []
            for one in (entry, entry.by_place):
                if one is None or any(not way.error for _, way in ways):
                    continue
                for values, training in itertools.product(one.arguments, modes):
                    asked = 0
                    for answers, size in tried:
                        if (size > 1 and not ways[-1][1].guessed) or (answers != _NO and asked < len(answers)):
                            continue
                        how = values, answers, size, training, self._holders, inside, entered
                        with kept:
                            way = silently(follow, module, one, *how)
                        ways.append((training, way))
                        if module not in self._called:
                            self.others |= self._elsewhere.used(way)
                        asked = max(asked, way.asked)
            yield entry, ways

    def _not_followed(self, module: nn.Module, error: str) -> Iterator[DirectRead]:
        """Whatever the code may read: parameters of the module, which are named, and weights of its linears."""
        why = NOT_FOLLOWED.format(kind=type(module).__name__, error=error)
        named, own = names_in_reach(module, self._names), _with_lists(module)
        for path, holder in module.named_modules():
            all_of_it = holder in own or (isinstance(holder, _CONTAINERS) and not named.isdisjoint(_naming(path)))
            if not of_torch(holder) or all_of_it:
                names = (name for name in _matrices(holder) if all_of_it or name in named)
                yield from (DirectRead(holder, name, None, why=why) for name in names)
        if self._leading.isdisjoint(named):
            return
        calls_with = not _CALLS_WITH.isdisjoint(named)
        for name, child in module.named_modules():
            if child in self._called and (calls_with or name.rpartition(".")[2] in named):
                yield DirectRead(child, "weight", None, why=REPLACED if calls_with else READ, own=False)


def _holds_more(module: nn.Module) -> bool:
    """Whether a linear has weights besides its own."""
    return len(_matrices(module)) > 1


def _holds_weights(module: nn.Module) -> bool:
    """Whether the module has parameters of its own that could be weights, or a child that is a list of them."""
    return not of_torch(module) and any(map(_matrices, _with_lists(module)))


def _with_lists(module: nn.Module) -> list[nn.Module]:
    return [module, *(child for child in module.children() if isinstance(child, _CONTAINERS))]


def _names_of_weights(model: nn.Module) -> set[str]:
    """What code says to read a weight: `self.mlp.w1`, and `self.tables` for `self.tables[0][1]`."""
    names: set[str] = set()
    for path, module in model.named_modules():
        names.update(_matrices(module))
        if isinstance(module, _CONTAINERS):
            names.update(_naming(path))
    return names


def _naming(path: str) -> list[str]:
    """The last part of a path that is no index."""
    return [one for one in path.split(".") if one and not one.isdecimal()][-1:]


def _matrices(module: nn.Module) -> list[str]:
    """The names of the module's parameters that could be weights."""
    return [name for name, p in module._parameters.items() if p is not None and is_plain(p) and p.ndim > 1]
