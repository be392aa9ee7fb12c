"""Checkpoints of the base go into an adapted model, and into none a part of them."""

import copy

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def test_a_checkpoint_of_the_base_loads_strictly_and_leaves_the_vectors():
    checkpoint = {name: torch.randn_like(value) for name, value in zoo.MLP().state_dict().items()}
    other = zoo.MLP()
    other.load_state_dict(checkpoint)
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    vectors = {name: vector.detach().clone() for name, vector in onelora.vectors(model).items()}
    assert model.load_state_dict(checkpoint) == ([], [])
    assert all(torch.equal(onelora.vectors(model)[name], vector) for name, vector in vectors.items())
    outer = nn.ModuleDict({"inner": copy.deepcopy(model)})
    outer.load_state_dict({f"inner.{name}": value for name, value in checkpoint.items()})
    x = torch.randn(5, 8)
    expected = fill_vectors(onelora.adapt(other), 0.5)(x)
    assert torch.equal(model(x), expected)
    assert torch.equal(outer["inner"](x), expected)
    onelora.detach(model)
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks


def _normed():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_checkpoint_of_the_base_is_the_base_of_heads_and_norms_too(device, outer, tmp_path):
    base = _normed().eval()
    base.load_state_dict({n: v + torch.rand_like(v) if v.ndim else v for n, v in base.state_dict().items()})
    with torch.device(device):
        model = onelora.adapt(_normed().eval(), onelora.OneLoRAConfig(modules_to_save=["3"], train_norms=True))
    holder, prefix = (nn.ModuleDict({"inner": model}), "inner.") if outer else (model, "")
    checkpoint = {prefix + name: value.clone() for name, value in base.state_dict().items()}
    holder.load_state_dict(checkpoint, assign=device == "meta")
    x = torch.randn(5, 8)
    expected = base(x)
    zoo.train(fill_vectors(model, 0.5), {"input": x})
    with onelora.disabled(model):
        assert torch.equal(model(x), expected)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(onelora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(x), model(x))
    with torch.no_grad():  # a checkpoint of a part says nothing of the rest
        holder.load_state_dict({prefix + "0.weight": base[0].weight.clone()}, strict=False)
    onelora.add_adapter(model, "fresh")
    onelora.set_adapter(model, "fresh")
    assert torch.equal(model(x), expected)
    assert torch.equal(onelora.detach(model)(x), expected)


@pytest.mark.parametrize("outer", [False, True])
def test_a_checkpoint_that_was_filled_up_with_the_vectors_of_the_model_is_of_the_base(outer):
    """As set_model_state_dict(full_state_dict=True) of torch.distributed and `model.state_dict() | base` are."""
    base, x = _normed().eval(), torch.randn(5, 8)
    model = onelora.adapt(_normed().eval(), onelora.OneLoRAConfig(modules_to_save=["3"], train_norms=True))
    holder, prefix = (nn.ModuleDict({"inner": model}), "inner.") if outer else (model, "")
    zoo.train(fill_vectors(model, 0.5), {"input": x})
    holder.load_state_dict(holder.state_dict() | {prefix + name: value for name, value in base.state_dict().items()})
    with onelora.disabled(model):
        assert torch.equal(model(x), base(x))
    zoo.train(model, {"input": x})
    trained = copy.deepcopy(model.state_dict())
    holder.load_state_dict(holder.state_dict())  # nothing that is new
    holder.load_state_dict(copy.deepcopy(holder.state_dict()))  # a trained one
    holder.load_state_dict(holder.state_dict() | {prefix + "3.weight": torch.randn(2, 6)})  # a head of somebody's
    holder.load_state_dict({prefix + "3.weight": torch.randn(2, 6)}, strict=False)  # the same alone
    without = {name: value for name, value in holder.state_dict().items() if "onelora_vector" not in name}
    holder.load_state_dict(without, strict=False)
    model.load_state_dict(trained)
    assert torch.equal(onelora.detach(model)(x), base(x))


def test_a_load_that_fails_makes_no_trained_head_the_base():
    model = onelora.adapt(_normed().eval(), onelora.OneLoRAConfig(modules_to_save=["3"], train_norms=True))
    base, x = copy.deepcopy(model), torch.randn(5, 8)
    zoo.train(fill_vectors(model, 0.5), {"input": x})
    checkpoint = onelora.detach(base).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for 3\.weight"):
        model.load_state_dict(checkpoint | {"3.weight": torch.zeros(9, 6), "3.bias": torch.zeros(9)}, strict=False)
    assert torch.equal(onelora.detach(model)(x), base(x))


def test_missing_vectors_are_counted_for_each_adapted_part():
    pair, config = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), onelora.OneLoRAConfig(target_modules=r"\d")
    parts = nn.ModuleList(onelora.adapt(copy.deepcopy(pair), config) for _ in range(2))
    checkpoint = parts.state_dict()
    names = [name for name in checkpoint if "onelora_vector" in name]
    for name in (left_out := [names[0], names[-1]]):  # as many in all as one part has
        del checkpoint[name]
    with (
        pytest.warns(onelora.OneLoRAWarning, match="1 of the 2 vectors"),
        pytest.raises(RuntimeError, match="Missing key.*" + ".*".join(left_out)),
    ):
        parts.load_state_dict(checkpoint)


def test_a_checkpoint_with_some_of_the_vectors_is_no_base():
    model = onelora.adapt(zoo.MLP())
    checkpoint = model.state_dict()
    left_out, *_ = (name for name in checkpoint if "onelora_vector" in name)
    del checkpoint[left_out]
    said = rf"2 of the 3 vectors.*without {left_out}: .*same OneLoRAConfig, or .* load_adapter"
    with (
        pytest.warns(onelora.OneLoRAWarning, match=said),
        pytest.raises(RuntimeError, match=f'Missing key.*"{left_out}"'),
    ):
        model.load_state_dict(checkpoint)
    for name in (whole := model.state_dict()):  # one shard after the other, as transformers loads them
        model.load_state_dict({name: whole[name]}, strict=False)
    checkpoint = model.state_dict()
    del checkpoint[left_out.replace("onelora_vector", "weight")]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(checkpoint)


def test_the_base_names_what_an_adapted_checkpoint_has_more():
    model = onelora.adapt(zoo.MLP())
    names = [name for name in model.state_dict() if "onelora_vector" in name]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*" + ".*".join(names)):
        zoo.MLP().load_state_dict(model.state_dict())
