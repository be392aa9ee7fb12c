"""Weights of linear ops that are no parameters of the model are named; what only resembles one is not."""

import copy

import pytest
import torch
from form_parts import module, weight
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.mkldnn import to_mkldnn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


class Holding(nn.Module):
    """Holds something past its parameters and children."""

    def __init__(self, hold, use):
        super().__init__()
        self.use = use
        hold(self)

    def forward(self, x):
        return self.use(self, x)


BUFFER, ELSEWHERE, COMPUTED = "a buffer and no parameter", "registered nowhere", "remove_parametrizations"
OTHERS = {
    "buffer": (
        lambda s: s.register_buffer("held", torch.randn(8, 8)),
        lambda s, x: F.linear(x, s.held),
        {"held": BUFFER},
    ),
    "slice_of_a_buffer": (
        lambda s: s.register_buffer("held", torch.randn(16, 8)),
        lambda s, x: x @ s.held[:8].T,
        {"held": BUFFER},
    ),
    "tensor": (
        lambda s: setattr(s, "held", torch.randn(8, 8)),
        lambda s, x: F.linear(x, s.held),
        {"held": ELSEWHERE},
    ),
    "tensors_in_one": (
        lambda s: setattr(s, "held", torch.randn(2, 8, 8)),
        lambda s, x: x @ s.held[1],
        {"held": ELSEWHERE},
    ),
    "list_of_parameters": (
        lambda s: setattr(s, "held", [weight(8, 8), weight(8, 8)]),
        lambda s, x: F.linear(x, s.held[1]),
        {"held[1]": ELSEWHERE},
    ),
    "dictionary_of_linears": (
        lambda s: setattr(s, "held", {"up": nn.Linear(8, 8)}),
        lambda s, x: s.held["up"](x),
        {"held['up']": ELSEWHERE},
    ),
    "weight_of_a_linear_in_a_list": (
        lambda s: setattr(s, "held", [nn.Linear(8, 8)]),
        lambda s, x: F.linear(x, s.held[0].weight),
        {"held[0]": ELSEWHERE},
    ),
    "parametrized": (
        lambda s: (s.register_parameter("held", weight(8, 8)), weight_norm(s, "held")),
        lambda s, x: F.linear(x, s.held),
        {"held": COMPUTED},
    ),
    "packed_and_parametrized": (
        lambda s: setattr(s, "held", weight_norm(nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight")),
        lambda s, x: s.held(x, x, x)[0],
        {"held.in_proj_weight": COMPUTED},
    ),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_weight_that_is_no_parameter_is_named(name, beside):
    hold, use, expected = OTHERS[name]
    blocks = [Holding(hold, use), Holding(hold, use)]
    for block in blocks if beside else ():
        block.fc = nn.Linear(8, 8)
    model, x = nn.Sequential(nn.Linear(8, 8), *blocks), torch.randn(5, 8)
    base = model(x)
    onelora.adapt(model)
    inside = [f"{block}.{one}" for block in (1, 2) for one in (["held.out_proj"] if name.startswith("packed") else [])]
    inside += ["1.fc", "2.fc"] if beside else []
    assert {*onelora.vectors(model)} == {"0", *inside}
    skipped = {place: why for place, why in onelora.summary(model).skipped.items() if not place.endswith(".fc")}
    assert skipped.keys() == {f"{block}.{place}" for block in (1, 2) for place in expected}
    assert all(expected[place.partition(".")[2]] in why for place, why in skipped.items())
    assert torch.equal(model(x), base)


def test_a_weight_alone_that_is_no_parameter_is_in_the_error():
    hold, use, _ = OTHERS["buffer"]
    with pytest.raises(onelora.TargetError, match="held"):
        onelora.adapt(Holding(hold, use))


def no_matrix(model):
    model.register_buffer("mask", torch.ones(5, 5).tril() > 0)
    model.register_buffer("bias", torch.zeros(5, 5))
    model.register_buffer("frequencies", torch.rand(4))
    model.places, model.scales, model.mixed = weight(5, 8), weight(1, 1, 8), weight(3)
    model.heads, model.other, model.unused = [torch.rand(2, 8)], {"a": torch.zeros(5, 8)}, [nn.Linear(8, 8)]


def gated(model, x):
    angles = torch.ones(5, 1) @ model.frequencies[None]
    x = x * torch.cat((angles.cos(), angles.sin()), -1) + model.places + model.other["a"]
    x = F.scaled_dot_product_attention(x, x, x, attn_mask=model.bias.masked_fill(~model.mask, -1e4))
    scores = (x @ x.transpose(1, 2)).masked_fill(~model.mask, 0.0) + model.bias
    x = (scores @ x) * model.scales + (x * model.heads[0].sum(0)) * x.pow(2).mean(-1, keepdim=True)
    mixed = (torch.stack([x, x, x]) * model.mixed.softmax(0)[:, None, None, None]).sum(0)
    return (mixed * model.scales).mean(1) + (mixed * model.places).sum(0).sum(0) + (x * x).sum(1)


def test_masks_gates_and_positions_are_not_named():
    model = nn.Sequential(nn.Linear(8, 8), Holding(no_matrix, gated))
    model(torch.randn(2, 5, 8))
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["0"]
    assert onelora.summary(model).skipped == onelora.summary(model).not_linear == {}
    torch.compile(model, backend="onelora", options={"inner": "eager"}, fullgraph=True)(torch.randn(2, 5, 8))


def test_a_weight_that_goes_through_an_identity_is_adapted():
    form = module(lambda s, x: F.linear(x, s.same(s.w)), w=weight(6, 8), same=nn.Identity())
    x = torch.randn(5, 8)
    fill_vectors(onelora.adapt(form), 0.5)
    assert list(onelora.vectors(form)) == ["w"]
    vector = onelora.vectors(form)["w"].double()
    expected = x.double() @ form._parameters["w"].double().T + x.double().sum(-1, keepdim=True) * vector
    assert_parity(form(x), expected, merged_copy(form)(x))
    fast = torch.compile(form, backend="onelora", options={"inner": "eager"}, fullgraph=True)
    torch.testing.assert_close(fast(x), merged_copy(form)(x))


def test_layers_that_a_conversion_put_in_the_places_of_all_adapted_ones_are_told(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    converted = to_mkldnn(onelora.adapt(model))  # takes weight and bias, which are the base's
    for use in (onelora.summary, onelora.merge, lambda m: onelora.save_adapter(m, tmp_path / "a.safetensors")):
        with pytest.raises(onelora.StateError, match=r"no layer .* has its vector any more.* convert first"):
            use(converted)
    assert not (tmp_path / "a.safetensors").exists()
    onelora.detach(converted)


def mkldnn_behind(model):
    model.body[2] = to_mkldnn(model.body[2])


def resized(model):
    """As transformers' `resize_token_embeddings` makes a new output head."""
    old, model.head = model.head, nn.Linear(8, 5)
    model.head.weight.data[:3], model.head.bias.data[:3] = old.weight, old.bias


def cut(model):
    del model.body[2]


@pytest.mark.parametrize(("change", "gone"), [(mkldnn_behind, r"body\.2"), (resized, "head"), (cut, r"body\.2")])
def test_vectors_that_some_layers_lost_are_told_once(change, gone, tmp_path):
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = module(lambda s, x: s.head(s.body(x)), body=body, head=nn.Linear(8, 3))
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(["0", "2", "head"])), 0.5)
    model = copy.deepcopy(model)
    onelora.summary(model)
    change(model)
    with pytest.warns(onelora.OneLoRAWarning, match=rf"was given 3 vectors and has 2: .* no layer {gone} has one now"):
        onelora.save_adapter(model, tmp_path / "a.safetensors")
    onelora.summary(model)
    onelora.merge(model)


def test_layers_that_changed_places_have_their_vectors():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    onelora.adapt(model)
    model[0], model[2] = model[2], model[0]
    model.append(nn.Sequential(model[2]))
    del model[2]
    assert list(onelora.summary(model).sites) == [("0", 8, 8), ("2.0", 8, 8)]
