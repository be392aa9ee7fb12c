"""Putting one object back as it was: a container, a class, a tensor, a random state.

Each function returns what undoes later changes, in place, and writes to nothing that has not changed.
"""

from __future__ import annotations

import array
import collections
import contextlib
import operator
import os
import random
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Undo = Callable[[], Any]
# Globals that Dynamo puts beside a function that it compiles, and takes away with the graph.
_OF_DYNAMO = re.compile(r"__(?!warningregistry)|.*_c\d+$")
_LARGEST = 64 * 2**20  # bytes of a numpy array that is copied


class WrittenTensors(TorchDispatchMode):
    """Keeps a copy of each tensor and each state of a generator before the first write to it, for `restore`."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Tensor, Tensor, int]] = []
        self._seen: dict[int, Any] = {}
        self._generators: list[tuple[torch.Generator, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, with what it writes to kept."""
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags or func._schema.name in ("aten::resize_", "aten::set_"):
            raise RuntimeError(f"{func} changes the shape of a tensor of the model")
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]:
            if isinstance(value, torch.Generator):
                self._generators.append((value, value.get_state()))
            elif argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and not tensor.is_meta and id(tensor) not in self._seen:
            self._seen[id(tensor)] = tensor
            self._kept.append((tensor, tensor.detach().clone(), 0 if tensor.is_inference() else tensor._version))

    def restore(self) -> None:
        """Write everything back, the last first: views of one tensor overlap."""
        for tensor, value, version in reversed(self._kept):
            write_back(tensor, value, version)
        for generator, state in reversed(self._generators):
            generator.set_state(state)


def _named(func: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs)


def write_back(tensor: Tensor, value: Tensor, version: int) -> None:
    """Restore values and version counter, so that a backward from before still works."""
    inference = tensor.is_inference()
    with torch.inference_mode(inference), torch.no_grad():
        own = tensor.detach()
        for axis in range(tensor.ndim if tensor.layout == torch.strided else 0):
            if own.stride(axis) == 0 and own.shape[axis] > 1:  # expanded: one memory, which can be written once
                own, value = own.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
        own.copy_(value)
    if not inference:
        # As in torch/autograd/grad_mode.py::_unsafe_preserve_version_counter
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def of_tensor(tensor: Tensor) -> Undo:
    """Of its values, by a copy: a batch norm writes to its statistics without counting up their version."""
    version = 0 if tensor.is_inference() else tensor._version
    return partial(write_back, tensor, tensor.detach().clone(), version)


def of_dict(values: dict[Any, Any], ordered: bool = True) -> Undo:
    """Of its entries, and their order where asked for: the globals of a module are never empty in between."""
    kind: Any = collections.OrderedDict if isinstance(values, collections.OrderedDict) else dict
    before = dict(kind.items(values))

    def undo() -> None:
        if _same(kind.keys(values), before) and _same(kind.values(values), before.values()):
            return
        for key in list(dict.keys(values)):  # another thread may change globals meanwhile
            if key not in before and (ordered or not _OF_DYNAMO.match(key)):
                kind.pop(values, key, None)
        for key, value in before.items():
            if dict.get(values, key, before) is not value:
                kind.__setitem__(values, key, value)
        if ordered and not _same(kind.keys(values), before):
            kind.clear(values)
            for key, value in before.items():
                kind.__setitem__(values, key, value)

    return undo


def of_list(values: Any) -> Undo:
    """Of the items of a list or a deque."""
    before = tuple(values)

    def undo() -> None:
        if _same(values, before):
            return
        if isinstance(values, list):
            list.__setitem__(values, slice(None), before)
        else:
            collections.deque.clear(values)
            collections.deque.extend(values, before)

    return undo


def of_set(values: set[Any]) -> Undo:
    """Of its items."""
    before = frozenset(values)

    def undo() -> None:
        if values != before:
            set.clear(values)
            set.update(values, before)

    return undo


def of_cell(cell: types.CellType) -> Undo:
    """Of a variable of a closure."""
    try:
        before = cell.cell_contents
    except ValueError:  # empty
        return lambda: None
    return partial(setattr, cell, "cell_contents", before)


def of_class(kind: type) -> Undo:
    """Of the attributes of a class."""
    before = dict(vars(kind))

    def undo() -> None:
        now = dict(vars(kind))
        for name in now.keys() - before.keys():
            type.__delattr__(kind, name)
        for name, value in before.items():
            if now.get(name, before) is not value:
                type.__setattr__(kind, name, value)

    return undo


def of_state(value: Any) -> Undo | None:
    """Of random generators, numpy arrays, arrays and byte arrays; None for anything else."""
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, bytearray):
        return partial(value.__setitem__, slice(None), bytes(value))
    if isinstance(value, array.array):
        return partial(value.__setitem__, slice(None), value[:])
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, numpy.ndarray) and value.flags.writeable and value.nbytes <= _LARGEST:
        return partial(value.__setitem__, ..., value.copy())
    return None


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """The default generators of Python, numpy and PyTorch stay as they are."""
    numpy = sys.modules.get("numpy")
    python, legacy = random.getstate(), numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """The environment variables of the process stay as they are."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(operator.is_, list(one), list(other)))
