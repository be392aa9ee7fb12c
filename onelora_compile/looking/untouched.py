"""Running a user's code without a trace of it: whatever the code can reach is as it was afterwards.

    with Kept(module):
        ...  # lists, dictionaries, configs, tensors, class attributes, globals, closures and random states may change

What code can reach is found before it runs: all objects below the roots, and of globals, modules and classes what has
a name that some reached code mentions.  Each container is copied one level deep and restored in place (`undo.py`), so
that nothing large is copied and nothing has to be copyable.  A tensor is copied when an operator is about to write to
it.  Functions with a cache run without it (warnings given once, tables by shape).

Settings of the process and of PyTorch are put back too.  Not covered: C extensions with a state of their own,
generators, files (`outside.py`), attributes of modules of the standard library.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import functools
import itertools
import logging
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.looking import undo
from onelora_compile.looking.one_at_a_time import LOOKING
from onelora_compile.looking.process_flags import process_flags

# Code of these is not looked into: a forward changes none of its state, but for what is kept by name below.
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "onelora_compile"}
_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout}
_PLAIN = {dict, list, set, tuple, frozenset, collections.OrderedDict, collections.deque}
_NOT_ENTERED = (logging.Logger, torch.fx.Graph)
_BUILTIN: tuple[Any, ...] = ([], (), range(0), range(2**64), {}, {}.values(), {}.items(), set(), "", b"", bytearray())
_ITERATORS: tuple[Any, ...] = (itertools.count, itertools.cycle, *(type(iter(one)) for one in _BUILTIN))
_CACHED: Any = type(functools.lru_cache(lambda: None))


class Kept:
    """A context after which all that the roots can reach is as it was; may be entered again and again.

    Args:
        roots: modules, functions, arguments of a call.
        tensors: copy all tensors but parameters at once, for code whose operators can't be watched.
        instead: makes what stands for a function, or for an object of some class, while the code runs: where globals
            and classes hold it.
    """

    def __init__(
        self, *roots: Any, tensors: bool = False, instead: Mapping[Any, Callable[[Any], Any]] | None = None
    ) -> None:
        self._copy_tensors = tensors
        self._stand_ins = dict(instead or {})
        self._undo: list[undo.Undo] = []
        # Not entered: what is imported stays imported, and all of the process is behind it.  Triton names it `modules`.
        self._seen: dict[int, Any] = {id(sys.modules): sys.modules}
        self._names: set[str] = set()
        self._spaces: dict[int, tuple[Any, Mapping[str, Any]]] = {}
        self._instead: list[tuple[Any, Any, Callable[[], Any]]] = []
        self._empty: list[Any] = []
        self._left: list[Any] = [*roots, logging.Logger]  # where libraries put their `warning_once`
        self._new_names = {"forward"}  # named by no code of the user
        with LOOKING:  # what another thread has changed for a while is not how it was
            while self._left:
                self._visit(self._left.pop())
                if not self._left:
                    self._mention()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(LOOKING)
            stack.callback(self.restore)
            stack.enter_context(undo.random_states())
            stack.enter_context(undo.environment())
            stack.enter_context(process_flags())
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            for holder, name, stand_in in self._instead:
                _assign(holder, name, stand_in())
            if not self._copy_tensors:
                written = undo.WrittenTensors()
                stack.callback(written.restore)
                stack.enter_context(written)
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def restore(self) -> None:
        """Undo what was changed; what can't be undone keeps nothing else from it."""
        failed: Exception | None = None
        for one in self._undo:
            try:
                one()
            except Exception as error:
                failed = failed or error
        for container in self._empty:
            if container:
                container.clear()
        if failed is not None:
            raise failed

    def _visit(self, value: Any) -> None:
        kind = type(value)  # isinstance would ask the object for its class
        if kind in _ATOMS or id(value) in self._seen:
            return
        if kind in _PLAIN and not value:  # as most of the dictionaries of a module
            self._empty += () if kind in (tuple, frozenset) else (value,)
            return
        self._seen[id(value)] = value  # kept alive, so that no other object gets its id
        if issubclass(kind, (dict, nn.Module)):
            self._object(value)
        elif issubclass(kind, types.FunctionType):
            self._function(value)
        elif issubclass(kind, types.MethodType):
            self._left += [value.__func__, value.__self__]
        elif issubclass(kind, (staticmethod, classmethod)):
            self._left.append(value.__func__)
        elif issubclass(kind, property):
            self._left += [value.fget, value.fset]
        elif issubclass(kind, functools.partial):
            self._left += [value.func, value.args, value.keywords]
        elif issubclass(kind, _CACHED):
            self._left.append(value.__wrapped__)
        elif issubclass(kind, types.ModuleType):
            if not of_library(value.__name__):
                self._globals(vars(value))
        elif issubclass(kind, type):
            self._class(value)
        elif issubclass(kind, Tensor):
            self._visit(object.__getattribute__(value, "__dict__"))
            if self._copy_tensors and not isinstance(value, nn.Parameter) and not value.is_meta:
                self._undo.append(undo.of_tensor(value))
        else:
            self._object(value)

    def _function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            self._undo.append(undo.of_cell(cell))
            with contextlib.suppress(ValueError):  # an empty cell
                self._left.append(cell.cell_contents)
        self._left += [function.__dict__, function.__defaults__, function.__kwdefaults__]
        if not of_library(function.__globals__.get("__name__")):
            self._globals(function.__globals__)
            self._new_names |= mentioned(function.__code__)

    def _globals(self, values: dict[str, Any]) -> None:
        if id(values) not in self._spaces:
            self._undo.append(undo.of_dict(values, ordered=False))
            self._space(values, values)

    def _class(self, kind: type) -> None:
        for one in kind.__mro__[:-1]:
            if id(one) not in self._spaces:
                # The class of an adapted module is its user's too: `type(self).calls += 1`.
                if not of_library(vars(one).get("_onelora_base", one).__module__):
                    self._undo.append(undo.of_class(one))
                self._space(one, vars(one))

    def _space(self, holder: Any, bindings: Mapping[str, Any]) -> None:
        """Something whose names code mentions: what is mentioned already, or called without a mention, is visited."""
        self._spaces[id(holder)] = (holder, bindings)
        # Not what Dynamo puts among a module's globals, `__compiled_fn_1` and `__resume_at_8_2`: all of its graphs.
        dunder = [name for name in dict(bindings) if name.startswith("__") and name.endswith("__")]
        special = [name for name in dunder if isinstance(bindings[name], types.FunctionType)]
        for name in self._names.intersection(bindings).union(special):
            self._binding(holder, name, bindings[name])

    def _mention(self) -> None:
        """Go on with what the code that was reached so far names."""
        new, self._new_names = self._new_names - self._names, set()
        self._names |= new
        for holder, bindings in list(self._spaces.values()) if new else ():
            for name in new.intersection(bindings):
                self._binding(holder, name, bindings[name])

    def _binding(self, holder: Any, name: str, value: Any) -> None:
        key = value if isinstance(value, types.FunctionType) else type(value)
        if (stand_in := self._stand_ins.get(key)) is not None:
            self._undo.append(functools.partial(_assign, holder, name, value))
            self._instead.append((holder, name, lambda: stand_in(value)))
        if isinstance(value, _CACHED) and not of_library(getattr(value, "__module__", None)):
            # Put back by itself: classes of libraries are not kept as a whole.
            self._undo.append(functools.partial(_assign, holder, name, value))
            self._instead.append((holder, name, lambda: value.__wrapped__))
        self._left.append(value)

    def _object(self, value: Any) -> None:
        kind = type(value)
        if issubclass(kind, dict):
            self._undo.append(undo.of_dict(value))
            self._left += dict.values(value)
            self._iterators(value, dict.items(value))
        elif issubclass(kind, (list, collections.deque)):
            self._undo.append(undo.of_list(value))
            self._left += value
            self._iterators(value, enumerate(value))
        elif issubclass(kind, set):
            self._undo.append(undo.of_set(value))
            self._left += value
        elif issubclass(kind, (tuple, frozenset)):
            self._left += value
        elif not issubclass(kind, nn.Module) and (state := undo.of_state(value)) is not None:
            self._undo.append(state)
        if kind in _PLAIN:
            return
        self._left.append(kind)
        if issubclass(kind, threading.local):
            self._left.append(value.__dict__)  # of this thread; object's is of none
        elif not issubclass(kind, _NOT_ENTERED):
            with contextlib.suppress(AttributeError, TypeError):
                self._left.append(object.__getattribute__(value, "__dict__"))
            for slot in _slots(kind):  # type: ignore[arg-type]  # classes are hashable
                with contextlib.suppress(AttributeError):  # not set
                    content = slot.__get__(value)
                    self._undo.append(functools.partial(slot.__set__, value, content))
                    self._left.append(content)

    def _iterators(self, holder: Any, items: Iterable[tuple[Any, Any]]) -> None:
        iterators = [(name, item) for name, item in items if isinstance(item, _ITERATORS)]
        self._instead += [(holder, name, functools.partial(_copied, item)) for name, item in iterators]


@functools.lru_cache(1000)
def _slots(kind: type) -> list[Any]:
    own = [vars(one) for one in kind.__mro__[:-1] if "__slots__" in vars(one) and not of_library(one.__module__)]
    return [value for one in own for value in one.values() if isinstance(value, types.MemberDescriptorType)]


@functools.lru_cache(10_000)
def mentioned(code: types.CodeType) -> frozenset[str]:
    """The globals and attributes that code names, with those of the functions in it."""
    inner = (mentioned(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def silently(function: Callable[..., Any], *args: Any) -> Any:
    """Call it with warnings and log messages off, and with context variables of its own."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return contextvars.copy_context().run(function, *args)
    finally:
        logging.disable(disabled)


def of_library(name: Any) -> bool:
    """Whether code of a module of that name is not looked into."""
    return str(name).partition(".")[0] in _LIBRARIES


def _assign(holder: Any, name: Any, value: Any) -> None:
    if isinstance(holder, type):
        type.__setattr__(holder, name, value)
    else:
        holder[name] = value


def _copied(iterator: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.14 can't copy those of itertools
        try:
            return copy.copy(iterator)
        except TypeError:
            return iterator
