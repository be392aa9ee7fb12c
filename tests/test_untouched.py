"""Looking changes nothing: adapt, summary and explain on modules whose forward leaves traces of every kind."""

import contextlib
import copy
import io
import logging
import random
import sys
from sys import modules
from typing import Any

import pytest
import torch
from leaks import LEAKS, Leaky, logged_once, once, state
from snapshot import snapshot
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, verify
from onelora_compile.looking.untouched import Kept
from onelora_compile.testing import fill_vectors


@pytest.fixture(autouse=True)
def _logger(monkeypatch):
    monkeypatch.setenv("LEFT", "1")
    monkeypatch.setenv("CHANGED", "1")
    monkeypatch.delenv("LEAKY", raising=False)
    monkeypatch.setattr(logging.Logger, "once", logged_once, raising=False)
    once.cache_clear()
    logged_once.cache_clear()


def without_state(model):
    """Take off what adapt is asked to add."""
    onelora.detach(model)
    for module in model.modules():
        del module._onelora_state


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


class Expanded(nn.Module):
    """A buffer whose rows are one memory, as of positions and masks."""

    rows: torch.Tensor

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("rows", torch.randn(4).expand(3, 4))

    def forward(self, x):
        self.rows[0].add_(1.0)
        return self.linear(x) + self.rows


def test_a_buffer_of_one_memory_is_put_back(tmp_path):
    model, x = Expanded(), torch.randn(3, 4)
    before = model.rows.clone()
    onelora.adapt(model)
    onelora.explain(model, x)
    assert torch.equal(model.rows, before)
    with Kept(model, tensors=True):
        model(x)
    assert torch.equal(model.rows, before)
    assert model.rows.stride() == (0, 1)


class Unrestorable(random.Random):
    def setstate(self, state):
        raise ValueError("no state of mine")


def test_what_can_not_be_put_back_keeps_nothing_else_from_it():
    model: Any = nn.Linear(4, 4)
    model.before, model.draws, model.after = [1], Unrestorable(), [1]

    def change():
        with Kept(model):
            model.before.append(2)
            model.after.append(2)

    with pytest.raises(ValueError, match="no state of mine"):
        change()
    assert model.before == model.after == [1]


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def test_what_dynamo_compiled_of_a_class_is_not_gone_through():
    """Its graphs are globals of the class's file: adapting took ten times as long after a compile."""
    ran: list[int] = []

    def backend(gm, inputs):
        def run(*args):
            ran.append(1)
            return gm.forward(*args)

        return run

    torch.compile(Compiled(), backend=backend)(torch.ones(3, 4))
    assert any(name.startswith("__compiled_fn") for name in globals())
    with Kept(Compiled()):
        ran.append(2)
    assert ran == [1, 2]  # what can be reached is put back


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


class Imports(nn.Module):
    """Imports something at its first call, and knows where all modules are, as triton.language does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        import imported_meanwhile  # type: ignore[import-not-found]  # written by the test

        assert modules["imported_meanwhile"] is imported_meanwhile
        return self.linear(x)


def test_what_is_imported_meanwhile_stays_imported(tmp_path, monkeypatch):
    """Taken back, the next import would give a second copy of its classes."""
    (tmp_path / "imported_meanwhile.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    model = onelora.adapt(Imports())
    assert list(onelora.vectors(model)) == ["linear"]
    found = sys.modules["imported_meanwhile"]
    model(torch.ones(3))
    assert sys.modules.pop("imported_meanwhile") is found
