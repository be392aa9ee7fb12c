"""Against two independent oracles: PEFT's MiSS of rank 1, which is the same map, and merged weights in float64."""

import copy
import warnings
from typing import Any

import pytest
import torch
import zoo

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy

COMPILED: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "aot_eager": {"inner": "aot_eager"},
    "inductor": {},
}


# Inductor takes 10 to 25 s for a model on two cores: against PEFT on all four, elsewhere on one.
INDUCTOR_ON = ("tiny_vit",)
CASES = [
    pytest.param(name, how, marks=pytest.mark.slow if how == "inductor" and name not in INDUCTOR_ON else ())
    for name in zoo.MODELS
    for how in COMPILED
]


def run(model, inputs):
    """Output and gradients of the vectors and of nothing else."""
    out = zoo.logits(model(**inputs))
    loss = (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    return out.detach(), gradients(loss, onelora.vectors(model))


def compiled(model, how):
    if COMPILED[how] is None:
        return model
    return torch.compile(model, backend="onelora", options=COMPILED[how] or None, fullgraph=True)


def peft_twin(model, vectors):
    """The same base adapted by PEFT's MissConfig(r=1) with the same vectors; returns (model, parameters)."""
    peft = pytest.importorskip("peft")
    config = peft.MissConfig(r=1, target_modules=list(vectors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.get_peft_model(model, config)
    parameters = {}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "miss_block" in name:
                key = name.removeprefix("base_model.model.").split(".miss_block")[0]
                parameter.copy_(vectors[key].detach().view(1, -1))
                parameters[key] = parameter
    assert set(parameters) == set(vectors)
    return twin, parameters


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("name", ["tiny_vit", "hf_vit", "bert", "llama"])
def test_agrees_with_peft_miss_of_rank_one(name, how):
    base, inputs = zoo.MODELS[name]()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    reference = merged_copy(model, torch.float64)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = zoo.logits(reference(**wide)).detach()
    out, grads = run(compiled(model, how), inputs)

    twin, parameters = peft_twin(base, onelora.vectors(model))
    theirs = zoo.logits(twin(**inputs))
    loss = (theirs.double() * torch.linspace(-1, 1, theirs.numel()).view(theirs.shape)).sum()
    their_grads = gradients(loss, parameters)

    assert_parity(out, expected, theirs.detach(), floor=4)
    torch.testing.assert_close(grads, {key: their_grads[key].view(-1) for key in grads}, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_agrees_with_merged_weights_in_float64(name, how):
    model, inputs = zoo.MODELS[name]()
    model = fill_vectors(onelora.adapt(model))
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    reference = merged_copy(model, torch.float64).requires_grad_(True)
    expected = zoo.logits(reference(**wide))
    loss = (expected * torch.linspace(-1, 1, expected.numel()).view(expected.shape)).sum()
    weights = {name: reference.get_parameter(f"{name}.weight") for name in onelora.vectors(model)}
    weight_grads = gradients(loss, weights)
    plain = zoo.logits(merged_copy(model)(**inputs)).detach()

    out, grads = run(compiled(model, how), inputs)
    assert_parity(out, expected.detach(), plain, floor=4)
    for key, grad in grads.items():
        # d loss / d b is the row sum of d loss / d W: along the axis of in_features.
        axis = 0 if name == "gpt2" else 1
        expected_grad = weight_grads[key].sum(axis)
        scale = expected_grad.abs().max().clamp_min(1e-3)
        assert (grad.double() - expected_grad).abs().max() <= 1e-4 * scale, key


@pytest.mark.parametrize(("name", "how"), CASES)
def test_zero_vectors_are_the_base(name, how):
    base, inputs = zoo.MODELS[name]()
    expected = zoo.logits(base(**inputs)).detach()
    model = onelora.adapt(copy.deepcopy(base))
    assert len(onelora.vectors(model)) == zoo.SITES[name]
    with torch.no_grad():
        out = zoo.logits(compiled(model, how)(**inputs))
        frozen: Any = (
            base if how == "eager" else torch.compile(base, backend=(COMPILED[how] or {}).get("inner", "inductor"))
        )
        same = zoo.logits(frozen.requires_grad_(False)(**inputs))
    if how == "inductor":  # its kernels are fused otherwise with the update: equal up to rounding
        torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(out, same)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_zero_vectors_keep_the_gradients_of_what_is_trained_besides():
    base, inputs = zoo.tiny_vit()
    base.requires_grad_(False)
    base.head.requires_grad_(True)
    expected = torch.autograd.grad(base(**inputs).square().sum(), list(base.head.parameters()))
    model = onelora.adapt(base, onelora.OneLoRAConfig(modules_to_save=["head"]))
    actual = torch.autograd.grad(model(**inputs).square().sum(), list(model.head.parameters()))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
