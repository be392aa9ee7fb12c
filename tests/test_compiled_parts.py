"""A model that is compiled in parts: graph breaks, a submodule, a function, each at its first call."""

import copy

import pytest
import torch
import zoo
from counted_graphs import Counter, base_with, build, first_call
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


@pytest.fixture
def counter():
    return Counter()


class BrokenBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.fc(x)
        torch._dynamo.graph_break()
        return self.out(x)


class Broken(nn.Module):
    """Breaks before its first op, and inside its blocks; shares a module and a weight."""

    def __init__(self):
        super().__init__()
        first = BrokenBlock()
        self.blocks = nn.ModuleList([first, BrokenBlock()])
        self.again = first.fc
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.again.weight

    def forward(self, x):
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x)
        return self.tied(self.again(x))


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_graph_breaks_adapt_the_whole_model_once(how, counter):
    model = Broken()
    base = copy.deepcopy(model)
    if how == "model.compile":
        model.compile(backend="onelora", options={"inner": counter})
    compiled = model if how == "model.compile" else build(counter, model)
    x = torch.randn(3, 8)
    out, messages = first_call(compiled, x)
    assert torch.equal(out, base(x))
    assert len(messages) == 1
    names = ["blocks.0.fc", "blocks.0.out", "blocks.1.fc", "blocks.1.out", "tied"]
    assert list(onelora.vectors(compiled)) == names
    fill_vectors(model, 0.3)
    twin = base_with(model, base)
    torch.testing.assert_close(compiled(x), twin(x))
    needed = Counter()
    build(needed, twin)(x)
    assert len(counter.graphs) <= len(needed.graphs)


def test_a_compiled_submodule_is_adapted_alone(counter):
    outer = nn.Sequential(nn.Linear(8, 8), zoo.MLP())
    outer[1] = build(counter, outer[1])
    x = torch.randn(3, 8)
    first_call(outer, x)
    assert list(onelora.vectors(outer)) == ["1.a", "1.b", "1.c"]
    assert outer[0].weight.requires_grad


def test_a_compiled_function_adapts_the_model_it_calls(counter):
    model = zoo.MLP()

    def step(x):
        return model(x).square().sum()

    x = torch.randn(5, 8)
    expected = step(x).detach()
    compiled = build(counter, step)
    out, messages = first_call(compiled, x)
    assert torch.equal(out, expected)
    assert len(messages) == 1
    fill_vectors(model, 0.5)
    torch.testing.assert_close(compiled(x), step(x))
    assert len(counter.graphs) == 1
