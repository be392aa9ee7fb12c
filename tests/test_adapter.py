"""adapt, vectors, trainable_parameters, detach: what they promise on every ordinary linear."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model, inputs, steps=3):
    optimizer = torch.optim.AdamW(onelora.trainable_parameters(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        zoo.logits(model(**inputs)).square().mean().backward()
        optimizer.step()


def test_adapt_returns_the_model_with_zero_float32_vectors_and_a_frozen_base():
    model, _ = zoo.tiny_vit()
    names = {name for name, _ in model.named_parameters()}
    assert onelora.adapt(model) is model
    vectors = onelora.vectors(model)
    assert vectors["blocks.0.qkv"].shape == (144,)
    assert all(v.dtype == torch.float32 and not v.any() and v.requires_grad for v in vectors.values())
    assert {id(p) for p in onelora.trainable_parameters(model)} == {id(v) for v in vectors.values()}
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in names)


def test_vectors_are_the_parameters_in_state_dict():
    model, _ = zoo.tiny_vit()
    vectors = onelora.vectors(onelora.adapt(model))
    assert model.state_dict()["blocks.1.fc1.onelora_vector"].data_ptr() == vectors["blocks.1.fc1"].data_ptr()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_training_and_detaching_leave_the_base_bit_identical(name):
    model, inputs = zoo.MODELS[name]()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, expected = state(model), zoo.logits(model(**inputs)).detach()
    onelora.adapt(model)
    train(model, inputs)
    assert all(v.any() for v in onelora.vectors(model).values())
    with torch.no_grad():
        assert not torch.equal(zoo.logits(model(**inputs)), expected)
        with onelora.disabled(model):
            assert torch.equal(zoo.logits(model(**inputs)), expected)
    assert onelora.detach(model) is model
    assert same_state(state(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(zoo.logits(model(**inputs)), expected)
    assert onelora.vectors(model) == {}


def test_detach_restores_what_modules_to_save_norms_and_batch_norm_changed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.ln = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6)
            self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

        def forward(self, x):
            return self.head(self.ln(self.bn(self.a(x))))

    model, x = Net(), {"x": torch.randn(16, 8)}
    before = state(model)
    onelora.adapt(model, onelora.OneLoRAConfig(modules_to_save=["head"], train_norms=True))
    assert list(onelora.vectors(model)) == ["a"]
    train(model, x)
    changed = {
        name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    assert {"head.0.weight", "ln.weight", "bn.weight", "bn.running_mean", "head.1.running_var"} <= changed
    assert "a.weight" not in changed
    model.eval()
    twin = Net().eval()
    twin.load_state_dict(before)
    with onelora.disabled(model), torch.no_grad():
        assert torch.equal(model(**x), twin(**x))
    onelora.detach(model)
    assert same_state(state(model), before)


def test_vector_dtype():
    model = onelora.adapt(zoo.MLP(), onelora.OneLoRAConfig(vector_dtype=torch.bfloat16))
    assert {v.dtype for v in onelora.vectors(model).values()} == {torch.bfloat16}


def test_deepcopy_and_pickle_are_independent_and_stay_adapted():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(5, 8)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert type(twin.a) is type(model.a)
        fill_vectors(twin, 3.0, seed=9)
        assert torch.equal(model(x), expected)
        with onelora.disabled(model):
            base = model(x)
        assert torch.equal(onelora.detach(twin)(x), base)
        assert torch.equal(model(x), expected)


def test_state_dict_round_trip():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    twin = onelora.adapt(zoo.MLP())
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(twin(x), model(x))


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
    train(fill_vectors(model, 0.5), {"input": x})
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
    train(fill_vectors(model, 0.5), {"input": x})
    holder.load_state_dict(holder.state_dict() | {prefix + name: value for name, value in base.state_dict().items()})
    with onelora.disabled(model):
        assert torch.equal(model(x), base(x))
    train(model, {"input": x})
    trained = state(model)
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
    train(fill_vectors(model, 0.5), {"input": x})
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
    with pytest.raises(RuntimeError, match="Missing key.*" + ".*".join(left_out)):
        parts.load_state_dict(checkpoint)


def test_a_checkpoint_with_some_of_the_vectors_is_no_base():
    model = onelora.adapt(zoo.MLP())
    checkpoint = model.state_dict()
    left_out, *_ = (name for name in checkpoint if "onelora_vector" in name)
    del checkpoint[left_out]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{left_out}"'):
        model.load_state_dict(checkpoint)
    checkpoint = model.state_dict()
    del checkpoint[left_out.replace("onelora_vector", "weight")]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(checkpoint)


def test_the_base_names_what_an_adapted_checkpoint_has_more():
    model = onelora.adapt(zoo.MLP())
    names = [name for name in model.state_dict() if "onelora_vector" in name]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*" + ".*".join(names)):
        zoo.MLP().load_state_dict(model.state_dict())


def test_adapted_in_inference_mode_can_still_be_trained():
    model = zoo.MLP()
    with torch.inference_mode():
        onelora.adapt(model)
        with onelora.disabled(model):
            model(torch.randn(5, 8))
    train(model, {"x": torch.randn(5, 8)})
    assert all(v.any() for v in onelora.vectors(model).values())


@pytest.mark.parametrize("how", ["parametrized", "normed", "pruned"])
def test_a_vector_that_is_computed_from_others_is_named(how):
    from torch.nn.utils import parametrizations, parametrize, prune

    base = zoo.MLP()
    model, layer = fill_vectors(onelora.adapt(base), 0.5), base.b
    if how == "parametrized":
        parametrize.register_parametrization(layer, "onelora_vector", nn.Tanh())
    elif how == "normed":
        parametrizations.weight_norm(layer, "onelora_vector")
    else:
        prune.l1_unstructured(layer, "onelora_vector", 1)
    y = torch.randn(5, 6)
    vector: Any = layer.onelora_vector
    merged = layer.weight + vector.unsqueeze(1)
    torch.testing.assert_close(layer(y), y @ merged.T + layer.bias)
    for asked in (onelora.vectors, onelora.merge, onelora.detach, lambda m: onelora.save_adapter(m, "a.safetensors")):
        with pytest.raises(onelora.StateError, match=r"'onelora_vector' of .*in_features.* is no parameter any more"):
            asked(model)


def test_a_module_that_another_tool_gave_a_class_is_not_broken():
    from torch.nn.utils import parametrizations, parametrize

    model, x = fill_vectors(onelora.adapt(zoo.MLP()), 0.5), torch.randn(5, 8)
    expected = model(x)
    parametrizations.weight_norm(model.b)
    with pytest.raises(onelora.StateError, match=r"'b' is a ParametrizedOneLoRALinear now.*undo that first"):
        onelora.detach(model)
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model.b, "weight")
    onelora.detach(model)
    assert type(model.b) is nn.Linear


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_layer_that_is_parametrized_since_is_saved_and_loaded(norm, tmp_path):
    def parametrized(model):
        torch.manual_seed(0)
        getattr(nn.utils.parametrizations, norm)(model.b)
        return model.eval()

    base, x = zoo.MLP(), torch.randn(5, 8)
    model = parametrized(fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5))
    expected, own = model(x), parametrized(copy.deepcopy(base))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), expected)
    fill_vectors(model, 3.0, seed=9)
    onelora.load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(onelora.load_adapter(own, tmp_path / "a.safetensors")(x), expected)
    other = zoo.MLP()
    with torch.no_grad():
        other.b.weight.add_(torch.randn_like(other.b.weight))
    with pytest.raises(onelora.BaseMismatchError):
        onelora.load_adapter(parametrized(other), tmp_path / "a.safetensors")


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_read_weight_that_a_parametrization_took_away_is_never_the_base(norm):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    model = fill_vectors(onelora.adapt(Reading()), 0.5)
    with pytest.raises(onelora.StateError, match=r"'w'.*is gone.*before adapt"):
        getattr(nn.utils.parametrizations, norm)(model, "w")


def test_adapting_twice_says_what_to_do():
    model = onelora.adapt(zoo.MLP())
    with pytest.raises(onelora.StateError, match=r"adapted already.*detach.*merge.*load_adapter"):
        onelora.adapt(model)
    outer = nn.Sequential(model)
    with pytest.raises(onelora.StateError, match="adapted already"):
        onelora.adapt(outer)
    with pytest.raises(onelora.StateError, match="submodule '0'"):
        onelora.detach(outer)


def test_not_adapted_says_what_to_do(tmp_path):
    model = zoo.MLP()
    for call in (
        lambda: onelora.detach(model),
        lambda: onelora.merge(model),
        lambda: onelora.save_adapter(model, tmp_path / "a"),
        lambda: onelora.trainable_parameters(model),
        lambda: onelora.summary(model),
        lambda: onelora.disabled(model).__enter__(),
    ):
        with pytest.raises(onelora.StateError, match=r"onelora\.adapt\(model\)"):
            call()


def test_not_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        onelora.adapt("model")  # type: ignore[type-var]


def test_a_compiled_model_is_accepted_everywhere(tmp_path):
    model: Any = torch.compile(zoo.MLP(), backend="eager")
    x = torch.randn(5, 8)
    base = model(x).detach()
    assert onelora.adapt(model) is model
    assert list(onelora.vectors(model)) == ["a", "b", "c"]
    fill_vectors(model, 0.5)
    assert not torch.allclose(model(x), base)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    onelora.load_adapter(model, tmp_path / "a.safetensors")
    assert onelora.summary(model).vector_parameters == 20
    with onelora.disabled(model):
        assert torch.equal(model(x), base)
    onelora.detach(model)
    assert torch.equal(model(x), base)


def test_a_compiled_submodule_leaves_no_trace_in_names():
    model = nn.Sequential(zoo.MLP(), nn.Linear(7, 2))
    compiled: Any = torch.compile(model[0], backend="eager")
    model[0] = compiled
    assert list(onelora.vectors(onelora.adapt(model))) == ["0.a", "0.b", "0.c", "1"]
    detached = onelora.detach(model)
    assert all(p.requires_grad for p in detached.parameters())


def test_summary_counts():
    model, _ = zoo.bert()
    base = sum(p.numel() for p in model.parameters())
    onelora.adapt(model, onelora.OneLoRAConfig(train_norms=True))
    report = onelora.summary(model)
    assert report.base_parameters == base
    assert report.vector_parameters == 2 * (5 * 48 + 96) + 48
    assert report.other_parameters == sum(p.numel() for n, p in model.named_parameters() if "LayerNorm" in n)
    assert report.skipped == {"classifier": "output head"}
    text = str(report)
    assert "13 vectors" in text
    assert "classifier: output head" in text
