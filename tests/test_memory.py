"""What autograd keeps for backward: an adapted model may keep at most 1 % more than its frozen base."""

import copy
from typing import Any

import pytest
import torch
import zoo

import onelora_compile as onelora
from onelora_compile.testing import saved_bytes


def run(model, inputs):
    """A forward whose input, or first embedding, requires a gradient, so that the frozen base saves at all."""

    def forward():
        wide = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        return zoo.logits(model(**wide))

    return forward


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_saved_bytes_are_those_of_the_frozen_base(how):
    torch.manual_seed(0)
    base = zoo.TinyViT(width=192, depth=4, heads=3).train().requires_grad_(False)
    inputs = {"x": torch.randn(8, 16, 12)}
    adapted = onelora.adapt(copy.deepcopy(base))
    models: dict[str, Any] = {"base": base, "adapted": adapted}
    if how != "eager":
        models["base"] = torch.compile(base, backend=how)
        models["adapted"] = torch.compile(adapted, backend="onelora", options={"inner": how})
        for model in models.values():
            run(model, inputs)()
    kept = {name: saved_bytes(run(model, inputs)) for name, model in models.items()}
    assert kept["base"] > 1_000_000
    assert kept["adapted"] <= 1.01 * kept["base"]


def test_a_lora_of_rank_one_saves_much_more():
    """The measure can tell: the same model with PEFT's LoRA keeps the inputs of its linears."""
    import warnings

    peft = pytest.importorskip("peft")
    base = zoo.TinyViT(width=192, depth=4, heads=3).requires_grad_(False)
    inputs = {"x": torch.randn(8, 16, 12)}
    floor = saved_bytes(run(base, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["qkv", "proj", "fc1", "fc2", "embed"]))
    assert saved_bytes(run(lora, inputs)) > 1.2 * floor
