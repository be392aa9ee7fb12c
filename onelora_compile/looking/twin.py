"""Call a module without a trace of the call: on a twin with tensors and side data of its own.

Put back besides: the random state (PyTorch's, Python's, NumPy's), the environment, settings of the process, and what
the code of its classes keeps on the classes and in its modules (counters, caches).  Hooks are not called; what the code
prints or warns of is dropped, and so is what it does to files.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.looking.one_at_a_time import LOOKING, silent
from onelora_compile.looking.outside import kept_outside
from onelora_compile.looking.process_flags import no_autocast, process_flags
from onelora_compile.looking.undo import environment

_OWN = ("torch", "builtins", "onelora_compile")
_CONTAINERS = (list, dict, set, collections.deque)


def twin_of(module: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A module that is like another one, in evaluation mode, without hooks.

    Args:
        module: not changed.
        tensor: makes a parameter or a buffer of the twin of one of the module's.

    Raises:
        Exception: whatever the side data of the module raises when it is copied.
    """
    memo: dict[int, Any] = {}
    for one in module.modules():
        memo[id(one)] = object.__new__(type(one))
        for held in (*one._parameters.values(), *one._buffers.values()):
            if held is not None and id(held) not in memo:
                memo[id(held)] = tensor(held)
        # PyTorch refuses to copy what a computation made: weights of torch.nn.utils.weight_norm.
        made = (value for value in vars(one).values() if isinstance(value, Tensor) and value.grad_fn is not None)
        memo |= {id(value): value.detach().clone() for value in made}
    for one in module.modules():
        fields = {name: type(value)() if _hooks(name) else value for name, value in vars(one).items()}
        fields |= {"training": False, "_compiled_call_impl": None}
        memo[id(one)].__dict__.update(copy.deepcopy(fields, memo))
    twin: nn.Module = memo[id(module)]
    return twin


def _hooks(name: str) -> bool:
    return name.startswith("_") and (name.endswith("_hooks") or "_hooks_" in name)


@contextlib.contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Inside the block the code of the module may run: afterwards what it may have changed is as it was."""
    with LOOKING:
        devices = sorted({t.device.index or 0 for t in (*module.parameters(), *module.buffers()) if t.is_cuda})
        kept = [(home, _contents(home)) for home in _homes(module)]
        python, numpy = random.getstate(), sys.modules.get("numpy")
        state = numpy.random.get_state() if numpy is not None else None
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                torch.random.fork_rng(devices),
                torch.no_grad(),
                no_autocast(),
                torch.compiler.set_stance("force_eager"),
                silent("stdout", "stderr"),
                environment(),
                process_flags(),
                kept_outside(),
            ):
                yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(state)
            for home, contents in kept:
                _restore(home, contents)


def _homes(module: nn.Module) -> list[Any]:
    """The classes of a module and of its children, and the modules that hold their code, of anybody but PyTorch."""
    kinds = {kind for one in module.modules() for kind in type(one).__mro__}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _OWN]
    functions = (value for kind in own for value in vars(kind).values() if isinstance(value, FunctionType))
    modules = {id(function.__globals__): function.__globals__ for function in functions}
    return [*own, *(held for held in modules.values() if str(held.get("__name__")).partition(".")[0] not in _OWN)]


def _contents(home: Any) -> dict[str, tuple[Any, Any]]:
    """Each value that is held there, with what is in it if it is a container."""
    held = home if isinstance(home, dict) else vars(home)
    values = {name: value for name, value in held.items() if not (name.startswith("__") and name.endswith("__"))}
    return {name: (value, copy.copy(value) if type(value) in _CONTAINERS else None) for name, value in values.items()}


def _restore(home: Any, contents: dict[str, tuple[Any, Any]]) -> None:
    now = _contents(home)
    for name in now.keys() - contents.keys():
        if isinstance(now[name][0], ModuleType):
            continue  # an import, which happens once
        if isinstance(home, dict):
            del home[name]
        else:
            delattr(home, name)
    for name, (value, before) in contents.items():
        if name not in now or now[name][0] is not value:
            _assign(home, name, value)
        if before is not None and not _same(value, before):
            value.clear()
            (value.update if isinstance(value, (dict, set)) else value.extend)(before)


def _same(value: Any, before: Any) -> bool:
    """Whether two containers hold the same objects; comparing tensors would compute."""
    pairs = zip(_flat(value), _flat(before), strict=False)
    return len(value) == len(before) and all(one is other for one, other in pairs)


def _flat(container: Any) -> list[Any]:
    return [one for pair in container.items() for one in pair] if isinstance(container, dict) else list(container)


def _assign(home: Any, name: str, value: Any) -> None:
    if isinstance(home, dict):
        home[name] = value
    else:
        setattr(home, name, value)
