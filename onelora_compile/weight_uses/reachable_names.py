"""What a forward can name: the attributes and strings in the code that it can reach, without running it.

Found by name, so rather too much than too little: functions that it names as globals, closures or methods, those in the
tables and objects of its module, and of other modules' classes what it names.  Code of PyTorch is not looked into.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from onelora_compile.looking.untouched import of_library

_ATOMS = (str, bytes, int, float, complex, type(None), Tensor)
_CACHED: Any = type(functools.lru_cache(lambda: None))
_UNNAMED = ("forward", "__call__", "__getattr__", "__getitem__")  # what is called without a name
_ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "stride", "requires_grad", "is_meta", "is_cuda"}
_CALLED = ("parameters", "state_dict", "forward")
_OF_NAMED = ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME")  # a class, or another module
_FLAGGED = sys.version_info >= (3, 12)
_MOST = 10_000  # entries of a container; data beyond


NamesOfCode = dict[Any, frozenset[str]]


def names_in_reach(module: nn.Module, known: NamesOfCode) -> frozenset[str]:
    """The attributes, globals and strings in the code that the module's forward can reach.

    Args:
        module: not changed.
        known: answers for modules of one kind, kept as long as no code changes.
    """
    parts: set[Any] = set()
    seen: set[int] = set()
    for value in vars(module).values():
        parts.update(_code_in(value, seen))
    others = (*module.children(), *modules_elsewhere(module))
    children = {type(one) for one in others if not of_library(type(one).__module__)}
    key = type(module), frozenset(parts), frozenset(children)
    if key not in known:
        known[key] = _names(*key)
    return known[key]


def _names(kind: type, parts: frozenset[Any], children: frozenset[type]) -> frozenset[str]:
    walk = _Walk()
    for child in children:  # their calls are looked at on their own
        walk.space_of(child, called=False)
    walk.enter(kind, *parts)
    return frozenset(walk.found)


class _Walk:
    """Visits functions and classes; of a class or of a function's globals, what some visited code names."""

    def __init__(self) -> None:
        self.names = set(_UNNAMED)  # what of a class is looked at
        self.found: set[str] = set()  # what stands in the code
        self._spaces: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._left: list[Any] = []

    def enter(self, *parts: Any) -> None:
        """Visit all that the parts can reach."""
        self._left += parts
        while self._left:
            part = self._left.pop()
            if id(part) in self._seen:
                continue
            self._seen.add(id(part))
            if isinstance(part, type):
                self.space_of(part)
            elif isinstance(part, types.ModuleType):
                self._space(part, self.names)
            else:
                self._function(part)

    def space_of(self, kind: type, called: bool = True) -> None:
        """Visit what is named of a class, and unless its objects are not `called`, what a call of one runs."""
        for one in kind.__mro__:
            if not of_library(one.__module__):
                self._space(one, self.names if called else self.names.difference(_UNNAMED))

    def _space(self, holder: Any, names: set[str]) -> None:
        if id(holder) not in self._spaces:
            self._spaces[id(holder)] = bindings = vars(holder)
            for name in names.intersection(bindings):
                self._left += _code_in(bindings[name], set())

    def _function(self, function: types.FunctionType) -> None:
        self._left += _code_in((function.__dict__, function.__defaults__, function.__kwdefaults__), set())
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                self._left += _code_in(cell.cell_contents, set())
        if of_library(function.__globals__.get("__name__")):
            return
        named = _named(function.__code__)
        for name in named.intersection(function.__globals__):
            self._left += _code_in(function.__globals__[name], set())
        strings = _strings(function.__code__)
        self.found |= named | strings.difference(_CALLED)
        new = (named | strings) - self.names
        self.names |= new
        for space in list(self._spaces.values()) if new else ():
            for name in new.intersection(space):
                self._left += _code_in(space[name], set())


def _code_in(value: Any, seen: set[int]) -> Iterator[Any]:
    """The functions in a value, the classes of its objects, and modules."""
    kind = type(value)  # isinstance would ask the object for its class
    if issubclass(kind, (*_ATOMS, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if issubclass(kind, types.FunctionType):
        yield value
    elif issubclass(kind, types.ModuleType):
        if not of_library(value.__name__):
            yield value
    elif issubclass(kind, type):
        if not of_library(value.__module__):
            yield value
    elif issubclass(kind, types.MethodType):
        yield from _code_in((value.__func__, type(value.__self__)), seen)
    elif issubclass(kind, (staticmethod, classmethod)):
        yield from _code_in(value.__func__, seen)
    elif issubclass(kind, property):
        yield from _code_in(value.fget, seen)
    elif issubclass(kind, _CACHED):
        yield from _code_in(value.__wrapped__, seen)
    elif issubclass(kind, functools.partial):
        yield from _code_in((value.func, value.args, value.keywords), seen)
    else:
        if not of_library(kind.__module__):
            yield kind
        for one in _contents(value):
            yield from _code_in(one, seen)


def modules_elsewhere(module: nn.Module) -> list[nn.Module]:
    """The modules that a module leads to and that are none of its children: in lists, or bound to functions."""
    fields = [value for name, value in vars(module).items() if name not in ("_modules", "_parameters", "_buffers")]
    return [one for one in _modules_in(fields, set()) if one is not module]


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a value is, holds or is bound to."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (dict, list, tuple, set, frozenset, functools.partial)) and id(value) not in seen:
        seen.add(id(value))
        inner = (value.func, value.args, value.keywords) if isinstance(value, functools.partial) else _contents(value)
        for one in inner:
            yield from _modules_in(one, seen)
    elif isinstance(value, types.MethodType):
        yield from _modules_in(value.__self__, seen)
    elif isinstance(value, types.FunctionType) and id(value) not in seen:
        seen.add(id(value))  # a function may refer to itself
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield from _modules_in(cell.cell_contents, seen)


def _contents(value: Any) -> list[Any]:
    """What a container holds, or what may hold code of the fields of an object."""
    if isinstance(value, dict):
        return list(dict.values(value))[:_MOST]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return [one for one in itertools.islice(value, _MOST) if not isinstance(one, _ATOMS)]
    with contextlib.suppress(AttributeError, TypeError):
        fields = object.__getattribute__(value, "__dict__").values()
        return [one for one in fields if callable(one) or isinstance(one, dict)]
    return []


@functools.lru_cache(10_000)
def _named(code: types.CodeType) -> frozenset[str]:
    """The globals and attributes that code names, less a `weight` that it only asks for its dtype or the like."""
    found = set(code.co_names)
    if not found.isdisjoint(("weight", *_CALLED)):
        steps = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
        pairs = list(itertools.pairwise(steps))
        if all(after.argval in _ABOUT for one, after in pairs if one.argval == "weight"):
            found.discard("weight")
        # inspect.signature(f).parameters is no call; super().forward(x) and self.forward are of the module itself.
        if not any(one.argval in ("parameters", "state_dict") and _is_call(one) for one in steps):
            found -= {"parameters", "state_dict"}
        if not any(one.argval == "forward" and _is_call(one) and before.opname in _OF_NAMED for before, one in pairs):
            found.discard("forward")
    inner = (_named(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(found).union(*inner)


def _is_call(step: dis.Instruction) -> bool:
    """Whether what an attribute gives is called: before Python 3.12 by an instruction of its own, then by a flag."""
    return step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1) and _FLAGGED)


@functools.lru_cache(10_000)
def _strings(code: types.CodeType) -> frozenset[str]:
    """The last part of each dotted string in code: names for `getattr`."""
    found = {constant.rpartition(".")[2] for constant in code.co_consts if isinstance(constant, str)}
    inner = (_strings(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(found).union(*inner)
