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
    zoo.train(model, inputs)
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
    zoo.train(model, x)
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


def test_adapted_in_inference_mode_can_still_be_trained():
    model = zoo.MLP()
    with torch.inference_mode():
        onelora.adapt(model)
        with onelora.disabled(model):
            model(torch.randn(5, 8))
    zoo.train(model, {"x": torch.randn(5, 8)})
    assert all(v.any() for v in onelora.vectors(model).values())


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
