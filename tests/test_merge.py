"""merge: one rounding, reported; only the adapted use of a weight changes."""

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy
from onelora_compile.weights.merge import FoldByRows, fold_weight


@pytest.mark.parametrize("name", zoo.MODELS)
def test_merged_model_is_the_adapted_one_and_plain_again(name):
    base, inputs = zoo.MODELS[name]()
    classes = [type(module) for module in base.modules()]
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    expected, reference = zoo.logits(model(**inputs)), merged_copy(model)
    onelora.merge(model)
    assert [type(module) for module in model.modules()] == classes
    assert onelora.vectors(model) == {}
    torch.testing.assert_close(zoo.logits(model(**inputs)), expected, rtol=1e-4, atol=1e-5)
    for (key, value), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, msg=key)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_rounding_to_the_stored_dtype(dtype):
    weight, vector = (torch.randn(37, 53) * 0.02).to(dtype), torch.randn(37) * 1e-3
    stored, loss = fold_weight(weight, vector)
    exact = weight.double() + vector.double()[:, None]
    assert stored.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(stored, weight + vector[:, None])
    else:
        assert torch.equal(
            stored, (weight.to(torch.float64 if dtype == torch.float64 else torch.float32) + vector[:, None]).to(dtype)
        )
    expected = (stored.double() - exact).norm() / (vector.double().norm() * 53**0.5)
    assert loss.relative == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)


def test_the_report_shows_what_bfloat16_swallows():
    linear = nn.Linear(256, 64)
    model = nn.Sequential(linear)
    nn.init.normal_(linear.weight, std=0.02)
    model.bfloat16()
    fill_vectors(onelora.adapt(model), 1e-4)
    weight = linear.weight.detach().clone()
    update = onelora.vectors(model)["0"].detach().clone()
    report = onelora.merge(model)
    unchanged = (linear.weight == weight)[update != 0].double().mean().item()
    assert 0.05 < unchanged < 1
    assert report.losses["0"].unchanged == pytest.approx(unchanged)
    assert report.worst == report.losses["0"].relative > 0.05
    assert "bfloat16" in str(report)


def test_zero_vectors_merge_to_the_same_bits():
    model, _ = zoo.tiny_vit()
    before = copy.deepcopy(model.state_dict())
    report = onelora.merge(onelora.adapt(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert report.worst == 0


def test_a_tied_embedding_does_not_change():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = fill_vectors(onelora.adapt(Tied()), 0.5)
    ids, table = torch.arange(11), model.embed.weight.detach().clone()
    expected = model(ids)
    onelora.merge(model)
    assert torch.equal(model.embed.weight, table)
    torch.testing.assert_close(model(ids), expected)


def test_two_linears_that_share_a_weight_keep_their_own_vectors():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    fill_vectors(onelora.adapt(model), 0.5)
    x = torch.randn(4, 6)
    expected = model(x)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_overflow_and_quantised_weights_are_refused_and_nothing_is_written():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).half()
    onelora.adapt(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        onelora.vectors(model)["0"].fill_(1.0)
        onelora.vectors(model)["1"].fill_(1e5)
    with pytest.raises(onelora.MergeError, match=r"'1'.*float16"):
        onelora.merge(model)
    for name, value in model.state_dict().items():
        assert "onelora" in name or torch.equal(value, before[name])
    assert list(onelora.vectors(model)) == ["0", "1"]

    with pytest.raises(onelora.MergeError, match="int8"):
        fold_weight(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2))


def test_a_parametrized_weight_is_refused():
    model = onelora.adapt(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))))
    with pytest.raises(onelora.MergeError, match=r"'0': its weight is not a parameter"):
        onelora.merge(model)
    assert list(onelora.vectors(model)) == ["0"]


def test_a_weight_that_a_removed_parametrization_left_as_a_buffer_is_named():
    model = onelora.adapt(nn.Sequential(nn.Linear(4, 3)))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")  # a parameter only of what is trained
    with pytest.raises(onelora.MergeError, match=r"'0': its weight is a buffer.*assign an nn.Parameter"):
        onelora.merge(model)
    left = model[0]._buffers.pop("weight")
    assert left is not None
    model[0].weight = nn.Parameter(left, requires_grad=False)
    fill_vectors(model, 0.5)
    x = torch.randn(5, 4)
    expected = model(x)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_merged_compiled_model_is_captured_again():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    compiled: Any = torch.compile(model, backend="onelora", options={"inner": "eager"})
    x = torch.randn(5, 8)
    expected = compiled(x).detach()
    onelora.merge(compiled)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


class _Views(nn.Module):
    """Weights in one memory, though no parameter is another: each layer keeps its own vector."""

    seen: torch.Tensor

    def __init__(self):
        super().__init__()
        self.enc, self.dec, self.q, self.out = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.dec.weight = nn.Parameter(self.enc.weight.detach().t())
        self.q.weight = nn.Parameter(self.enc.weight.detach()[:3])
        self.out.weight = nn.Parameter(torch.randn(8).expand(2, 8))  # its rows are one memory
        self.register_buffer("seen", self.enc.weight.detach()[3])

    def forward(self, x):
        hidden = self.dec(torch.relu(self.enc(x)))
        return self.out(hidden) + self.q(x).sum(-1, keepdim=True) + x @ self.seen[:, None]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_of_a_weight_stay_the_bases(mode):
    torch.manual_seed(0)
    x, rng = torch.randn(5, 8), torch.Generator().manual_seed(1)
    with mode():
        model = _Views()
    onelora.adapt(model)
    added = {name: torch.randn(v.shape, generator=rng) for name, v in onelora.vectors(model).items()}
    with torch.no_grad():
        for name, vector in onelora.vectors(model).items():
            vector.copy_(added[name])
    layers = {name: getattr(model, name) for name in added}
    weights = {name: (one.weight.detach().double(), one.bias.detach().double()) for name, one in layers.items()}
    seen = model.seen.double()

    def layer(name, x):
        weight, bias = weights[name]
        return x @ weight.T + bias + x.sum(-1, keepdim=True) * added[name].double()

    hidden = layer("dec", torch.relu(layer("enc", x.double())))
    exact = layer("out", hidden) + layer("q", x.double()).sum(-1, keepdim=True) + x.double() @ seen[:, None]
    with torch.no_grad():
        plain = model(x)
        onelora.merge(model)
        assert_parity(model(x), exact, plain)


def test_what_is_outside_of_the_adapted_part_stays_the_bases():
    enc, dec = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.ModuleDict({"enc": nn.Sequential(enc), "dec": dec})
    dec.weight = enc.weight
    before = dec.weight.detach().clone()
    fill_vectors(onelora.adapt(model["enc"]), 0.5)
    onelora.merge(model["enc"])
    assert torch.equal(dec.weight, before)
    assert not torch.equal(enc.weight, before)


@pytest.mark.parametrize("none", [float("nan"), float("inf")])
def test_a_sum_that_does_not_fit_is_told_beside_numbers_that_are_none(none):
    weight, vector = torch.zeros(4, 8, dtype=torch.float16), torch.tensor([0.0, 0.0, 1e5, 0.0])
    weight[0, 1] = none
    with pytest.raises(onelora.MergeError, match=r"does not fit torch\.float16"):
        fold_weight(weight, vector)
    with pytest.raises(onelora.MergeError, match=r"does not fit torch\.float16"):
        FoldByRows((4, 8), vector).add(0, weight.clone())
    vector[2] = 1
    stored, _ = fold_weight(weight, vector)
    FoldByRows((4, 8), vector).add(0, rows := weight.clone())
    expected = weight.double() + vector.double()[:, None]
    for one in (stored, rows):
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=0, equal_nan=True)


def test_merged_in_inference_mode_can_still_be_trained():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.3)
    x = torch.randn(5, 8)
    exact, plain = copy.deepcopy(model).double()(x.double()), model(x)
    with torch.inference_mode():
        onelora.merge(model)
    assert_parity(model(x), exact, plain)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model(x), plain)
