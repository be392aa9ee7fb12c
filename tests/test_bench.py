"""bench: the right things are compared; how long they take is not a test."""

import copy

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.report.bench import BASE, OWN, bench
from onelora_compile.testing import fill_vectors


@pytest.mark.slow
def test_eager_and_compiled_of_a_base_and_its_adapted_copy():
    model, inputs = zoo.MODELS["tiny_vit"]()
    before = copy.deepcopy(model.state_dict())
    report = bench(model, (), inputs, rounds=2)
    assert [(row.mode, row.method) for row in report.rows] == [
        (mode, method) for mode in ("eager", "compiled") for method in (BASE, OWN)
    ]
    assert report.vectors == zoo.SITES["tiny_vit"]
    for row in report.rows:
        assert row.milliseconds > 0
        assert row.kept > 0
        assert row.ratio[1] <= row.ratio[0] <= row.ratio[2]
        if row.method == BASE:
            assert row.ratio == (1, 1, 1)
    assert onelora.vectors(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "training step of TinyViT" in str(report)


def test_token_ids_and_a_model_that_is_adapted():
    model, inputs = zoo.MODELS["bert"]()
    fill_vectors(onelora.adapt(model))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    report = bench(model, (), inputs, rounds=2, compiled=False)
    assert [row.method for row in report.rows] == [BASE, OWN]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_tensor_alone_is_the_one_argument():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    report = bench(model, torch.randn(3, 4), rounds=2, compiled=False)
    assert [row.kept for row in report.rows] == [
        row.kept for row in bench(model, (torch.randn(3, 4),), rounds=2, compiled=False).rows
    ]


def test_a_model_without_a_gradient_is_an_error():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, ids):
            return self.linear(ids.float()).argmax(-1)

    with pytest.raises(onelora.ConfigError, match="no output has a gradient"):
        bench(Ids(), (torch.zeros(2, 4, dtype=torch.long),), rounds=2, compiled=False)


def test_the_users_random_state_and_objects_are_left_alone():
    class Counting(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            type(self).calls += 1
            return self.linear(x + torch.rand(()))

    model, state = Counting(), torch.get_rng_state()
    bench(model, (torch.ones(2, 4),), rounds=2, compiled=False, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert Counting.calls == 0
