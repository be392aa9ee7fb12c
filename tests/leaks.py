"""Modules whose forward leaves something behind, in every way that Python and PyTorch have."""

import collections
import copy
import functools
import itertools
import logging
import os
import random
import warnings
from typing import Any

import numpy
import torch
from snapshot import snapshot
from torch import nn
from torch.nn import functional as F

COUNTS: dict[str, Any] = {"calls": 0, "seen": []}
CALLS = 0
TABLE = torch.zeros(3)


class Config:
    kinds: list = []

    def __init__(self):
        self.kind = None
        self.nested: dict[str, Any] = {"sizes": [], "ids": set()}


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0


CONFIG = Config()


@functools.lru_cache
def once(text):
    warnings.warn(text, UserWarning, stacklevel=2)


def closure():
    calls, seen = 0, []

    def count(x):
        nonlocal calls
        calls += 1
        seen.append(x)
        return calls

    return count


count = closure()


def helper(x):
    """Reaches globals from a function that the forward calls."""
    global CALLS
    CALLS += 1
    COUNTS["calls"] += 1
    COUNTS["seen"].append(x)
    helper.last = x  # type: ignore[attr-defined]
    CONFIG.kind = x
    return x


class Leaky(nn.Module):
    """A read weight, so that it is traced, and a way to leave something behind."""

    calls = 0

    def __init__(self, leak):
        super().__init__()
        self.weight, self.leak = nn.Parameter(torch.randn(4, 4)), leak
        self.child = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.config, self.slotted, self.tensor, self.array = Config(), Slotted(), torch.zeros(3), numpy.zeros(3)
        self.list, self.dict, self.set = [1], {"a": 1}, {1}
        self.deque, self.default = collections.deque([1], maxlen=3), collections.defaultdict(list, a=[1])
        self.ordered, self.nested = collections.OrderedDict(a=1, b=2), {"list": [[torch.zeros(2)]]}
        self.generator, self.random = torch.Generator(), random.Random(0)
        self.numpy_random = numpy.random.default_rng(0)
        self.counter, self.steps_left, self.names = itertools.count(), iter(range(9)), iter({"a": 1, "b": 2})

    def forward(self, x, labels=None):
        h = self.norm(self.child(F.linear(x, self.weight)))
        LEAKS[self.leak](self, h)
        return h


def by_if(m, x):
    m.config.kind = "single" if x.sum() > 0 else "multi"


def in_place(m, x):
    m.tensor.add_(1)
    m.tensor[0] = 5
    m.nested["list"][0][0].mul_(3).add_(1)
    m.array[0] += 1


def torch_random(m, x):
    torch.rand(3)
    torch.rand(3, generator=m.generator)


def ordered(m, x):
    m.ordered.move_to_end("a")
    m.dict["a"] = m.dict.pop("a")
    m.dict["b"] = x


def environment(m, x):
    os.environ["LEAKY"] = "1"
    os.environ.pop("LEFT", None)
    os.environ["CHANGED"] = "2"


LEAKS = {
    "config": by_if,
    "config_nested": lambda m, x: (m.config.nested["sizes"].append(x), m.config.nested["ids"].add(1)),
    "class_of_config": lambda m, x: Config.kinds.append(x),
    "class_attribute": lambda m, x: setattr(type(m), "calls", type(m).calls + 1),
    "new_class_attribute": lambda m, x: setattr(Leaky, "fresh", x),
    "slots": lambda m, x: setattr(m.slotted, "calls", 1),
    "list": lambda m, x: m.list.append(x),
    "list_slice": lambda m, x: m.list.__setitem__(slice(None), [x, x]),
    "dict": lambda m, x: m.dict.update(key=x),
    "ordered": ordered,
    "set": lambda m, x: m.set.add(2),
    "deque": lambda m, x: m.deque.extend([x, x, x]),
    "default": lambda m, x: m.default["new"].append(x),
    "attribute": lambda m, x: setattr(m, "cache", x),
    "child_attribute": lambda m, x: setattr(m.child, "cache", x),
    "child_hooks": lambda m, x: m.child.register_forward_hook(lambda *_: None),
    "buffer": lambda m, x: m.steps.add_(1),
    "buffer_of_child": lambda m, x: m.norm.num_batches_tracked.add_(1),
    "tensors": in_place,
    "global": lambda m, x: helper(x),
    "global_tensor": lambda m, x: TABLE.add_(1),
    "closure": lambda m, x: count(x),
    "torch_random": torch_random,
    "python_random": lambda m, x: (random.random(), m.random.random()),
    "numpy_random": lambda m, x: (numpy.random.rand(), m.numpy_random.random()),
    "once": lambda m, x: once("only once"),
    "logger_once": lambda m, x: logging.getLogger("leak").once("only once"),  # type: ignore[attr-defined]
    "warning": lambda m, x: warnings.warn("every time", UserWarning, stacklevel=1),
    "iterator": lambda m, x: (next(m.counter), next(m.steps_left), next(m.names)),
    "grad_mode": lambda m, x: torch.set_grad_enabled(False),
    "default_dtype": lambda m, x: torch.set_default_dtype(torch.float64),
    "training": lambda m, x: m.child.train(False),
    "environment": environment,
    "attribute_of_a_weight": lambda m, x: setattr(m.child.weight, "tag", 1),
    "attribute_of_a_tensor": lambda m, x: setattr(m.tensor, "tag", 1),
    "error": lambda m, x: (m.list.append(x), 1 / 0),
    "nothing": lambda m, x: None,
}


@functools.lru_cache
def logged_once(self, text):
    self.warning(text)


def state(model):
    here = [
        COUNTS,
        CALLS,
        TABLE,
        CONFIG,
        count,
        helper,
        Leaky,
        [name for name in globals() if not name.startswith("_")],
    ]
    caches = [
        once.cache_info(),
        logged_once.cache_info(),
        repr(model.counter),
        list(copy.copy(model.steps_left)),
        list(copy.copy(model.names)),
    ]
    modes = [torch.is_grad_enabled(), str(torch.get_default_dtype()), sorted(os.environ.items())]
    return snapshot(model, here, caches, modes)
