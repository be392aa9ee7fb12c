"""Weights read by what a call runs besides the forward of the module's class, or past the model's tree: adapted too."""

import functools
import types

import pytest
import torch
from blocks import Block
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def patched(self, x):
    return F.linear(x, self.b.weight)


def of_the_instance(model):
    model.block.forward = types.MethodType(patched, model.block)


def a_lambda(model):
    block = model.block
    block.forward = lambda x: patched(block, x)


def a_partial(model):
    model.block.forward = functools.partial(patched, model.block)


def a_hook(model):
    model.block.b.register_forward_hook(lambda module, given, out: F.linear(given[0], 2 * module.weight) + out)


class Hook:
    def __call__(self, module, given, out):
        return out + F.linear(given[0], module.weight)


class HookModule(nn.Module):
    def forward(self, module, given, out):
        return out + F.linear(given[0], module.weight)


def a_hook_object(model):
    model.block.b.register_forward_hook(Hook())


def a_hook_module(model):
    model.block.b.register_forward_hook(HookModule())


def a_hook_with_keywords(model):
    hook = lambda module, given, named, out: out + F.linear(given[0], module.weight)  # noqa: E731
    model.block.b.register_forward_hook(hook, with_kwargs=True)


def a_hook_before(model):
    model.block.b.register_forward_pre_hook(lambda module, given: (F.linear(given[0], module.weight),))


def a_hook_of_the_block(model):
    model.block.register_forward_hook(lambda module, given, out: out + patched(module, given[0]))


class Called(Block):
    def __call__(self, x):
        return patched(self, x)


def the_call(model):
    model.block = Called()


class CalledLinear(nn.Linear):
    def __call__(self, x):
        return F.linear(x, self.weight)


def the_call_of_a_linear(model):
    model.block.b = CalledLinear(8, 8)


class Reference(nn.Module):
    parent: "Model"

    def __init__(self, model):
        super().__init__()
        self.siblings = [model.block.b]
        object.__setattr__(self, "parent", model)

    def forward(self, x):
        return F.linear(x, self.siblings[0].weight)


def a_sibling_in_a_list(model):
    model.other = Reference(model)


class AsksParent(Reference):
    def forward(self, x):
        return self.parent.product(x)


def a_method_of_the_parent(model):
    model.other = AsksParent(model)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.other, self.out = Block(), nn.Identity(), nn.Linear(8, 3)

    def product(self, x):
        return F.linear(x, self.block.b.weight, self.block.b.bias)

    def forward(self, x):
        return self.out(torch.tanh(self.other(torch.tanh(self.block(x)))))


WAYS = [
    *(of_the_instance, a_lambda, a_partial, a_hook, a_hook_object, a_hook_module, a_hook_with_keywords),
    *(a_hook_before, a_hook_of_the_block),
    *(the_call, the_call_of_a_linear, a_sibling_in_a_list, a_method_of_the_parent),
]


def build(change):
    torch.manual_seed(0)
    model = Model()
    change(model)
    return model.eval(), torch.randn(5, 8)


def merged(change, model, x):
    """What a model with W + vector 1ᵀ in the place of W gives: of its class anew, as copies share bound functions."""
    whole = build(change)[0].double()
    with torch.no_grad():
        for name, vector in onelora.vectors(model).items():
            whole.get_submodule(name).weight += vector.double()[:, None]
    return whole(x.double())


@pytest.mark.parametrize("change", WAYS)
def test_is_adapted_on_every_way(change):
    model, x = build(change)
    base = model(x)
    onelora.adapt(model)
    assert set(onelora.vectors(model)) == {"block.b", "out"}
    assert torch.equal(model(x), base)
    fill_vectors(model, 0.5)
    expected = merged(change, model, x)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    fast = torch.compile(model, backend="onelora", options={"inner": "eager"})
    torch.testing.assert_close(fast(x).double(), expected, rtol=1e-5, atol=1e-5)
    onelora.merge(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", WAYS)
def test_one_line_gives_the_same_vectors(change):
    model, x = build(change)
    base = model(x)
    fast = torch.compile(model, backend="onelora", options={"inner": "eager"})
    with pytest.warns(onelora.OneLoRAWarning, match="adapted 2 linears"):
        torch.testing.assert_close(fast(x), base)
    fill_vectors(model, 0.5)
    torch.testing.assert_close(fast(x).double(), merged(change, model, x), rtol=1e-5, atol=1e-5)
