"""Looking changes nothing: adapt, summary and explain on modules whose forward leaves traces of every kind."""

import collections
import contextlib
import copy
import functools
import io
import itertools
import logging
import os
import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from snapshot import snapshot
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, verify
from onelora_compile.testing import fill_vectors

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


@pytest.fixture(autouse=True)
def _logger(monkeypatch):
    monkeypatch.setenv("LEFT", "1")
    monkeypatch.setenv("CHANGED", "1")
    monkeypatch.delenv("LEAKY", raising=False)
    monkeypatch.setattr(logging.Logger, "once", logged_once, raising=False)
    once.cache_clear()
    logged_once.cache_clear()


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


def without_state(model):
    """Take off what adapt is asked to add."""
    onelora.detach(model)
    del model._onelora_state


@pytest.mark.parametrize("leak", LEAKS)
def test_adapting_leaves_nothing_behind(leak):
    model = Leaky(leak)
    before = state(model)
    assert list(onelora.vectors(onelora.adapt(model))) == ["", "child"]
    onelora.summary(model)
    copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())
    without_state(model)
    assert state(model) == before


CAPTURED = sorted(
    LEAKS.keys() - {"error", "child_hooks", "iterator", "default_dtype", "logger_once", "once", "warning"}
)
FEW = {"nothing", "buffer", "list", "torch_random", "global", "tensors"}


@pytest.mark.parametrize("leak", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CAPTURED])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_explaining_leaves_nothing_behind(leak):
    model = fill_vectors(onelora.adapt(Leaky(leak)))
    before = state(model)
    onelora.explain(model, torch.ones(3, 4))
    assert state(model) == before


@pytest.mark.parametrize("leak", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in LEAKS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exporting_and_verifying_leave_nothing_behind(leak, tmp_path):
    """Also where torch.export or ONNX Runtime can't follow, which is an error."""
    model, x = fill_vectors(onelora.adapt(Leaky(leak))), torch.ones(3, 4)
    export_onnx(fill_vectors(onelora.adapt(Leaky("nothing"))), (x,), tmp_path / "other.onnx", progress=False)
    before = state(model)
    with contextlib.suppress(Exception):
        export_onnx(model, (x,), tmp_path / "m.onnx", progress=False)
    assert state(model) == before
    assert (tmp_path / "m.onnx").exists() or leak != "nothing"
    with contextlib.suppress(Exception):
        verify(tmp_path / "other.onnx", model, [x])
    assert state(model) == before


def test_explaining_again_and_again_uses_nothing_of_dynamo():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    graphs = []

    def backend(gm, inputs):
        graphs.append([one for one in inputs if isinstance(one, torch.SymInt)])
        return gm.forward

    compiled = torch.compile(onelora.adapt(model), backend=backend)
    compiled(torch.ones(3, 4))
    before = snapshot(model)
    first = onelora.explain(model, torch.ones(3, 4))
    assert [site.adapted for site in first.sites] == [True, True]
    for rows in range(2, 12):
        assert onelora.explain(model, torch.ones(rows, 4)).sites == first.sites
    assert snapshot(model) == before
    compiled(torch.ones(3, 4))
    assert len(graphs) == 1
    model.eval()
    compiled(torch.ones(3, 4))
    assert graphs == [[], []]


def test_explaining_before_anything_is_compiled():
    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x)

    model, graphs = onelora.adapt(Fresh()), []

    def backend(gm, inputs):
        graphs.append(len([one for one in inputs if not isinstance(one, torch.Tensor)]))
        return gm.forward

    for rows in range(2, 14):
        assert len(onelora.explain(model, torch.ones(rows, 4)).sites) == 1
    torch.compile(model, backend=backend)(torch.ones(50, 4))
    assert graphs == [0]  # no size became dynamic by looking


def test_transforms_of_functions_over_the_vectors():
    model = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))))
    x = torch.randn(5, 4)
    vectors = {f"{name}.onelora_vector": vector for name, vector in onelora.vectors(model).items()}

    def loss(vectors, x):
        return torch.func.functional_call(model, vectors, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(vectors, x)
    stacked = {name: torch.stack([vector, 2 * vector]) for name, vector in vectors.items()}
    both = torch.func.vmap(loss, (0, None))(stacked, x)
    tangents = {name: torch.ones_like(vector) for name, vector in vectors.items()}
    moved = torch.func.jvp(lambda v: loss(v, x), (vectors,), (tangents,))[1]
    model(x).square().sum().backward()  # observed as ever: no batched tensor was kept
    whole = {name: model.get_parameter(name).grad for name in vectors}
    for name in vectors:
        torch.testing.assert_close(each[name].sum(0), whole[name])
    torch.testing.assert_close(moved, torch.stack([each[name].sum() for name in vectors]).sum())
    torch.testing.assert_close(both[0], loss(vectors, x))
