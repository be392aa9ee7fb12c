"""Which layers 1LoRA can move: shares by a formula of their own, and nothing changed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, StateError, TargetError


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(F.linear(x, self.w)))


def state(model):
    numbers = {name: value.clone() for name, value in model.state_dict().items()}
    return numbers, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def test_shares_and_sums_are_those_of_the_formulas():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = torch.randn(5, 8).double()
    report = onelora.diagnose(model, (x,), loss=lambda output: output.square().sum())
    model(x).square().sum().backward()
    for layer, module, given in zip(report.layers, (model[0], model[2]), (x, torch.tanh(model[0](x))), strict=True):
        gradient = module.weight.grad
        ones = torch.ones(module.in_features, 1).double() / module.in_features**0.5
        assert layer.share == pytest.approx(((gradient @ ones).norm() / gradient.norm()).item() ** 2)
        sums = given.sum(-1)
        assert layer.constant == pytest.approx((sums.mean() ** 2 / sums.square().mean()).item())
        assert layer.times_random == pytest.approx((layer.share or 0.0) * module.in_features)
    assert report.loss == "the loss"


def test_a_norm_of_ones_leaves_constant_sums_and_is_advised_against():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    nn.init.constant_(model[1].bias, 0.1)
    nn.init.constant_(model[3].bias, 0.1)
    report = onelora.diagnose(model, (torch.randn(5, 8),))
    assert [layer.constant is not None and layer.constant > 0.99 for layer in report.layers] == [False, True, True]
    assert report.norms
    assert any("train_norms=True" in sentence for sentence in report.advice)
    assert any("2 of 3" in sentence for sentence in report.advice)


def test_weights_that_are_read_have_a_share():
    torch.manual_seed(0)
    model, x = Read(), torch.randn(5, 8)
    report = onelora.diagnose(model, (x,))
    assert [layer.name for layer in report.layers] == ["w", "out"]
    assert report.layers[0].share is not None
    assert report.layers[0].constant is None
    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    report = onelora.diagnose(attention, (torch.randn(2, 5, 16),))
    assert len(report.layers) == 8
    assert all(layer.share is not None and 0 <= layer.share <= 1 for layer in report.layers)


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_of_the_model_changes(adapted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[0].weight.requires_grad_(False)
    if adapted:
        onelora.adapt(model)
    before, random, hooks = state(copy.deepcopy(model)), torch.get_rng_state(), len(model[0]._forward_pre_hooks)
    onelora.diagnose(model, (torch.randn(4, 8, generator=torch.Generator().manual_seed(1)),))
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert torch.equal(random, torch.get_rng_state())
    assert len(model[0]._forward_pre_hooks) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_of_a_transformers_model_and_a_choice_of_layers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertForSequenceClassification(config)
    kwargs = {"input_ids": torch.randint(0, 50, (4, 7)), "labels": torch.tensor([0, 1, 1, 0])}
    report = onelora.diagnose(model, kwargs=kwargs, config=onelora.OneLoRAConfig(target_modules=["query"]))
    assert report.loss == "the model's loss"
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["query", "query"]


def test_mistakes_are_told():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TargetError, match="matches no module"):
        onelora.diagnose(model, (torch.randn(2, 4),), config=onelora.OneLoRAConfig(target_modules=["no"]))
    with pytest.raises(ConfigError, match="holds no floating tensor"):
        onelora.diagnose(type("Says", (nn.Sequential,), {"forward": lambda self, x: "yes"})(nn.Linear(4, 4)), (1,))
    with pytest.raises(ConfigError, match="has a gradient"):
        onelora.diagnose(model, (torch.randn(2, 4),), loss=lambda output: torch.zeros(()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_the_loss_does_not_reach_is_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    report = onelora.diagnose(model, (torch.randn(2, 4),))
    assert {layer.name: layer.share is None for layer in report.layers} == {"used": False, "unused": True}
    assert any("get no gradient" in sentence and "unused" in sentence for sentence in report.advice)
    assert "unused" in str(report)


def test_what_the_forward_keeps_of_its_calls_is_as_before():
    class Counts(nn.Sequential):
        seen: list[int]

        def forward(self, x):
            self.seen.append(x.shape[0])
            return super().forward(x)

    model: Any = Counts(nn.Linear(4, 4))
    model.seen = [7]
    onelora.diagnose(model, (torch.randn(2, 4),))
    assert model.seen == [7]


def test_a_tensor_alone_is_the_one_argument():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4)
    assert onelora.diagnose(model, x) == onelora.diagnose(model, (x,))


def test_what_has_no_numbers_is_refused_by_name():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4)
    with pytest.raises(ConfigError, match="an input is on the meta device"):
        onelora.diagnose(model, (x.to("meta"),))
    model[1].to("meta")
    with pytest.raises(StateError, match=r"weight of '1' is not in memory .*load the model into memory"):
        onelora.diagnose(model, (x,))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("loss", [lambda output: None, lambda output: output, lambda output: 3.0])
def test_a_loss_that_is_no_number_is_named(loss):
    with pytest.raises(ConfigError, match=r"the loss gave .*has to give a tensor with one number"):
        onelora.diagnose(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), loss=loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_without_a_finite_loss_is_refused(value):
    with pytest.raises(ConfigError, match="give inputs whose loss is a finite number"):
        onelora.diagnose(nn.Sequential(nn.Linear(4, 4)), torch.full((2, 4), value), loss=lambda output: output.mean())


def test_inference_mode_outside_changes_nothing():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with torch.inference_mode():
        inside = onelora.diagnose(model, x)
    assert inside == onelora.diagnose(model, x)
