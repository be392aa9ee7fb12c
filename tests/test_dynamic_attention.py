"""Attention whose sizes and dropout Dynamo holds dynamic, in graphs inside graphs, and under transforms."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import onelora_compile as onelora
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.graph.subgraphs import scopes
from onelora_compile.passes.open_attention import ATTENTION
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

WIDTH, HEADS, LENGTH = 16, 4, 5
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(LENGTH).expand(3, LENGTH) >= torch.tensor([[5], [4], [2]])},
    "added": {"attn_mask": torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH)},
    "forbidden": {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)},
    "weights": {"need_weights": True},
}


class Attention(nn.MultiheadAttention):
    """Self-attention, of one input."""

    def __init__(self, dropout=0.0):
        super().__init__(WIDTH, HEADS, dropout=dropout, batch_first=True)
        nn.init.normal_(self.in_proj_bias)
        nn.init.normal_(self.out_proj.bias)

    def forward(self, x, need_weights=False, **masks):  # type: ignore[override]
        return super().forward(x, x, x, need_weights=need_weights, **masks)[0]


def formula(base, vectors, x, key_padding_mask=None, attn_mask=None, need_weights=False):
    """Softmax attention in the dtype of x, of W + b 1ᵀ with the base's W."""

    def linear(x, weight, bias, vector):
        return x @ (weight + vector[:, None]).to(x.dtype).mT + bias.to(x.dtype)

    inside = linear(x, base.in_proj_weight, base.in_proj_bias, vectors["in_proj_weight"])
    q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in inside.chunk(3, -1))
    scores = q @ k.mT / (WIDTH // HEADS) ** 0.5
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask, float("-inf")) if masked else scores + attn_mask
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None], float("-inf"))
    heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return linear(heads, base.out_proj.weight, base.out_proj.bias, vectors["out_proj"])


def adapted(model):
    base = copy.deepcopy(model)
    return fill_vectors(onelora.adapt(model), 0.5), base


def compiled(model, dynamic):
    """The model, and the targets of the graph that an inner backend gets: one that does not ask for the numbers."""
    targets = []

    def inner(gm, inputs):
        targets.append([node.target for scope in scopes(gm) for node in scope.gm.graph.nodes])
        return gm.forward

    options: dict[str, Any] = {"inner": inner}
    return torch.compile(model, backend="onelora", options=options, fullgraph=True, dynamic=dynamic), targets


DYNAMIC, TRAINING = {"auto": None, "dynamic": True, "static": False}, {"train": True, "eval": False}
# Every fourth walks all of each column by default.
CASES = [
    pytest.param(
        DYNAMIC[dynamic],
        TRAINING[training],
        mask,
        id=f"{dynamic}-{training}-{mask}",
        marks=pytest.mark.slow if number % 4 else (),
    )
    for number, (dynamic, training, mask) in enumerate(itertools.product(DYNAMIC, TRAINING, MASKS))
]


@pytest.mark.parametrize(("dynamic", "training", "mask"), CASES)
def test_every_update_is_moved_to_the_activations(dynamic, training, mask):
    torch.manual_seed(0)
    model, base = adapted(Attention().train(training))
    run, targets = compiled(model, dynamic)
    for _ in range(2):
        x = torch.randn(3, LENGTH, WIDTH)
        vectors = {name: vector.detach().double() for name, vector in onelora.vectors(model).items()}
        exact = formula(copy.deepcopy(base).double(), vectors, x.double(), **MASKS[mask])
        plain = formula(base, {name: vector.float() for name, vector in vectors.items()}, x, **MASKS[mask])
        assert_parity(run(x, **MASKS[mask]), exact, plain, floor=16)
    assert all({ATTENTION, ADAPTED_WEIGHT}.isdisjoint(graph) for graph in targets)
    assert [graph.count(torch.ops.aten.linear.default) for graph in targets] == [2]


def test_another_dropout_is_another_graph():
    model, base = adapted(Attention(dropout=0.0).train())
    run, targets = compiled(model, dynamic=True)
    x = torch.randn(3, LENGTH, WIDTH)
    torch.testing.assert_close(run(x), merged_copy(model)(x))
    model.dropout = 1.0  # no head gives anything
    torch.testing.assert_close(run(x), base.out_proj.bias.expand(3, LENGTH, WIDTH))
    model.dropout = 0.5
    torch.manual_seed(1)
    found = run(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))
    assert len(targets) == 3
    assert not any(ATTENTION in graph for graph in targets)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_explain_lists_it_where_everything_is_dynamic(training):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.1, batch_first=True).train(training)
    with torch._dynamo.config.patch(assume_static_by_default=False):
        report = onelora.explain(onelora.adapt(layer), torch.randn(3, LENGTH, WIDTH))
    assert [(site.name, site.out_features, site.lowering) for site in report.sites] == [
        ("self_attn.in_proj_weight", 48, "producer_consumer"),
        ("self_attn.out_proj", 16, "producer_consumer"),
        ("linear1", 32, "producer_consumer"),
        ("linear2", 16, "producer_consumer"),
    ]


class Around(nn.Module):
    """Attention that is called in a way of its own."""

    def __init__(self, call):
        super().__init__()
        self.attention, self.call = Attention(), call

    def forward(self, x):
        return self.call(self.attention, x)


# how it is called -> the lowering that its linears get
CALLS = {
    "checkpoint": (lambda attend, x: checkpoint(attend, x, use_reentrant=False), "producer_consumer"),
    "vmap": (lambda attend, x: torch.vmap(lambda one: attend(one[None])[0])(x), "in the weight"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize("is_adapted", [True, False], ids=["adapted", "base"])
@pytest.mark.parametrize("call", CALLS)
def test_explain_lists_it_wherever_it_is_called(call, is_adapted):
    model, x = Around(CALLS[call][0]), torch.randn(3, LENGTH, WIDTH)
    if is_adapted:
        onelora.adapt(model)
    sites = onelora.explain(model, x).sites
    assert [(site.name, site.in_features, site.out_features) for site in sites] == [
        ("attention.in_proj_weight", 16, 48),
        ("attention.out_proj", 16, 16),
    ]
    assert [site.adapted for site in sites] == [is_adapted] * 2
    assert [site.lowering for site in sites] == [CALLS[call][1] if is_adapted else ""] * 2
    reason = "torch.func transform" if is_adapted else "the default config would adapt it"
    assert all(reason in site.why + site.reason for site in sites if call == "vmap" or not is_adapted)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize("call", CALLS)
def test_it_computes_the_same_wherever_it_is_called(call):
    torch.manual_seed(0)
    model, base = adapted(Around(CALLS[call][0]))
    x = torch.randn(3, LENGTH, WIDTH)
    names = {name.removeprefix("attention."): vector.detach() for name, vector in onelora.vectors(model).items()}
    wide = {name: vector.double() for name, vector in names.items()}
    exact = formula(copy.deepcopy(base.attention).double(), wide, x.double())
    run = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    assert_parity(run(x), exact, formula(base.attention, names, x), floor=16)
