"""A first call with a graph break before anything is captured: all is adapted, and what gets no gradient is said."""

import copy
import itertools
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import onelora_compile as onelora
from onelora_compile.errors import OneLoRAWarning
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


class Disabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 6)

    @torch.compiler.disable
    def forward(self, x):
        return self.l(x).tanh()


class Broken(Disabled):
    def forward(self, x):
        x = self.l(x)
        torch._dynamo.graph_break()
        return x.tanh()


class Plain(Disabled):
    def forward(self, x):
        return self.l(x).tanh()


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.far, self.near = Disabled(), nn.Linear(6, 6)

    def forward(self, x):
        return self.far(x) + self.near(x)


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant=False):
        super().__init__()
        self.inner, self.reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return checkpoint_sequential(self.all, 2, x, use_reentrant=False)


def hooked():
    module = Plain()
    module.register_full_backward_hook(lambda *_: None)
    return module


FIRST = {
    "disabled": Disabled,
    "broken": Broken,
    "beside": Beside,
    "hooked": hooked,
    "segments": Segments,
    "checkpointed disabled": lambda: Checkpointed(Disabled()),
    "checkpointed broken": lambda: Checkpointed(Broken()),
    "reentrant": lambda: Checkpointed(Disabled(), use_reentrant=True),
    "plain": Plain,
}
WAYS = {
    "model": lambda model: torch.compile(model, backend="onelora"),
    "function": lambda model: torch.compile(lambda x: model(x), backend="onelora"),
    "in place": lambda model: model.compile(backend="onelora") or model,
}
CASES = [pytest.param(first, way, id=f"{first}, {way}") for first, way in itertools.product(FIRST, WAYS)]


def of(first):
    return nn.Sequential(FIRST[first](), Plain()), torch.randn(3, 6, requires_grad=True)


def all_learn(model):
    return all(vector.grad is not None and vector.grad.any() for vector in onelora.vectors(model).values())


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(("first", "way"), CASES)
def test_what_ran_before_the_first_graph_is_said(first, way):
    model, x = of(first)
    names, base = linears(model), model(x)
    fast = WAYS[way](model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = fast(x)
        torch.testing.assert_close(y, base)
        assert onelora.vectors(model).keys() == names
        said = any("A graph break split this call" in str(one.message) for one in caught)
        try:
            y.square().sum().backward()
        except torch.utils.checkpoint.CheckpointError:
            assert said
    if not said:
        assert all_learn(model)


@pytest.mark.parametrize(("first", "way"), CASES)
def test_a_first_call_without_gradients_is_always_right(first, way):
    model, x = of(first)
    names, base = linears(model), copy.deepcopy(model)
    fast = WAYS[way](model)
    with pytest.warns(OneLoRAWarning, match="adapted"), torch.no_grad():
        first_output = fast(x)
    assert_parity(first_output, base.double()(x.double()), base.float()(x))
    assert onelora.vectors(model).keys() == names
    fill_vectors(model, 0.1)
    y, merged = fast(x), merged_copy(model, torch.float64)
    assert_parity(y, merged(x.double()), merged.float()(x))
    y.square().sum().backward()
    assert all_learn(model)
