"""Loops that go by values are followed to an end that does not hang, and loops over layers to theirs."""

import pytest
import torch
from form_parts import weight
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.weight_uses import model_code
from onelora_compile.weight_uses.follow_forward import follow


def while_large(m, x):
    while x.abs().max() > 1:
        x = F.linear(x, m.w) * 0.1
    return m.fc(x)


def until_small(m, x):
    steps = 0
    while not torch.all(x < 1):
        x, steps = F.linear(x, m.w) * 0.1 ** (steps + 1), steps + 1
    return m.fc(x)


def as_a_number(m, x):
    while float(x.norm()) > 1e-3:
        x = F.linear(x, m.w) * 0.1
    return m.fc(x)


def as_a_count(m, x):
    while int(x.sum()) > 0:
        x = F.linear(x, m.w) * 0.1
    return m.fc(x)


def in_a_helper(m, x):
    def large(x):
        return bool(x.max() > 1)

    while large(x):
        for _ in range(40):
            x = torch.tanh(F.linear(x, m.w))
    return m.fc(x)


def counting(m, x):
    i = 0
    while i < x.sum():
        i += 1
    return m.fc(F.linear(x, m.w)) * i


@pytest.mark.parametrize("forward", [while_large, until_small, as_a_number, as_a_count, in_a_helper, counting])
def test_a_loop_that_goes_by_values_is_few_steps(forward, monkeypatch):
    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.w = nn.Linear(8, 8), weight(8, 8)

    Looping.forward = forward
    steps = []

    def noted(*args):
        way = follow(*args)
        steps.append(len(way.gm.graph.nodes))
        return way

    monkeypatch.setattr(model_code, "follow", noted)
    model = onelora.adapt(Looping())
    assert set(onelora.vectors(model)) == {"fc", "w"}
    assert max(steps) < (9000 if forward is in_a_helper else 1000)


def test_a_loop_over_many_layers_that_asks_for_each_is_followed_to_its_end():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(300))
            self.weights = nn.ParameterList(weight(4, 4) for _ in range(300))
            self.head = weight(3, 4)

        def forward(self, x):
            for layer, own in zip(self.layers, self.weights, strict=True):
                x = layer(x)
                if x.abs().max() > 1:
                    x = F.linear(x, own)
            return F.linear(x, self.head)

    model = onelora.adapt(Deep())
    assert "head" in onelora.vectors(model)
    assert len(onelora.vectors(model)) == 601
