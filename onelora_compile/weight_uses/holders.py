"""Who holds a parameter of a model, whoever the code has it from; and what leads to one past its attribute."""

from __future__ import annotations

import collections
import functools
import itertools
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.kinds import is_plain

_MOST = 10_000  # entries of a container; data beyond


def held_in(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The first module that holds each parameter, and its name there, by the identity of the parameter."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (module, name))
    return found


class Holders:
    """Who holds the parameters of a model; those that could be weights, of two axes and more, by their memory too."""

    def __init__(self, model: nn.Module) -> None:
        self.of = held_in(model)
        self.stored: dict[int, nn.Parameter] = {}
        for module, name in self.of.values():
            parameter = module._parameters[name]
            if parameter is not None and is_plain(parameter) and parameter.ndim > 1:
                self.stored.setdefault(_storage(parameter), parameter)
        self.stored.pop(0, None)

    def parameter(self, value: Any) -> nn.Parameter | None:
        """The weight that a value is, or shares its memory with, as what `state_dict()` holds; None for others."""
        if not isinstance(value, Tensor):
            return None
        if isinstance(value, nn.Parameter):
            return value if id(value) in self.of and is_plain(value) and value.ndim > 1 else None
        return self.stored.get(_storage(value))


class References:
    """What the state of modules leads to, besides their parameters and children."""

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._seen: dict[int, tuple[Any, bool, bool]] = {}

    def of(self, module: nn.Module) -> tuple[bool, bool]:
        """Whether it leads to code or to a module, and to a weight, as far as other code than PyTorch's may read it."""
        fields = vars(module)
        names = fields.keys() - {"_parameters", "_buffers", "_modules"}
        if of_torch(module):
            names &= {"forward", "_forward_hooks", "_forward_pre_hooks"}
        found = [self._refers(fields[name]) for name in names]
        return any(one for one, _ in found), any(one for _, one in found)

    def _refers(self, value: Any) -> tuple[bool, bool]:
        """Whether a value leads to code or to a module, and to a parameter that is not an attribute of one."""
        kind = type(value)
        if issubclass(kind, Tensor):
            return False, self._holders.parameter(value) is not None
        if issubclass(kind, (nn.Module, types.FunctionType, types.MethodType, functools.partial)):
            if issubclass(kind, nn.Module):
                return True, False
            if id(value) not in self._seen:
                self._seen[id(value)] = (value, True, False)  # a function may refer to itself
                self._seen[id(value)] = (value, True, any(self._refers(one)[1] for one in _bound(value)))
            return self._seen[id(value)][1:]
        if issubclass(kind, type) or isinstance(value, types.ModuleType):
            return False, False
        if id(value) not in self._seen:
            self._seen[id(value)] = (value, False, False)  # while it is looked at
            found = [self._refers(one) for one in _content(value)]
            self._seen[id(value)] = (value, any(one for one, _ in found), any(one for _, one in found))
        return self._seen[id(value)][1:]


def of_torch(module: nn.Module) -> bool:
    """Whether it is PyTorch's own, whose code is known."""
    kinds = (kind for kind in type(module).__mro__ if kind.__module__ != torch.nn.utils.parametrize.__name__)
    return next(kinds).__module__.startswith("torch.nn.")


def _bound(function: Any) -> Iterable[Any]:
    """What is bound to a function."""
    if isinstance(function, functools.partial):
        return (function.func, function.args, function.keywords)
    if isinstance(function, types.MethodType):
        return (function.__func__,)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return (*cells, function.__defaults__, function.__kwdefaults__)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _content(value: Any) -> Iterable[Any]:
    """What a container holds, and the fields of an object of somebody else's class."""
    if isinstance(value, dict):
        return list(dict.values(value))[:_MOST]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return list(itertools.islice(value, _MOST))
    if type(value).__module__.partition(".")[0] in ("torch", "numpy"):
        return ()
    return list(getattr(value, "__dict__", {}).values())


def _storage(tensor: Tensor) -> int:
    """What tells whether two tensors share memory; 0 where there is none."""
    return tensor.data_ptr() if tensor.layout == torch.strided and not tensor.is_meta and is_plain(tensor) else 0
