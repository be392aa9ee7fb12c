"""torch.compile(model, backend="onelora") on a model that nobody adapted."""

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
import zoo
from counted_graphs import Counter, base_with, build, first_call
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy


@pytest.fixture
def counter():
    return Counter()


def test_the_first_call_adapts_and_says_so_and_costs_no_compilation(counter, tmp_path):
    model = zoo.MLP()
    base = copy.deepcopy(model)
    compiled = build(counter, model, fullgraph=True)
    x = torch.randn(5, 8)
    out, messages = first_call(compiled, x)
    assert torch.equal(out, base(x))
    (message,) = messages
    for part in ("adapted 3 linears of MLP", "a, b, c", "froze", "trainable_parameters", "adapt"):
        assert part in message

    assert list(onelora.vectors(compiled)) == list(onelora.vectors(model)) == ["a", "b", "c"]
    assert len(onelora.trainable_parameters(compiled)) == 3
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(v) for v in onelora.vectors(model).values()}

    fill_vectors(model, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(x), merged_copy(base_with(model, base))(x))
        torch.testing.assert_close(model(x), compiled(x))  # eager
    assert len(counter.graphs) == 1
    onelora.save_adapter(compiled, tmp_path / "a.safetensors")
    assert set(onelora.read_adapter(tmp_path / "a.safetensors").vectors) == {"a", "b", "c"}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_it_trains(inner):
    model = zoo.MLP()
    expected = onelora.adapt(copy.deepcopy(model))
    compiled = torch.compile(model, backend="onelora", options={"inner": inner})
    x = torch.randn(5, 8)
    first_call(compiled, x)
    for trained, forward in ((model, compiled), (expected, expected)):
        optimizer = torch.optim.SGD(onelora.trainable_parameters(trained), lr=0.002)
        for _ in range(4):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
    for name, vector in onelora.vectors(model).items():
        assert vector.any()
        torch.testing.assert_close(vector, onelora.vectors(expected)[name])
    assert model.a.weight.grad is None


def test_the_first_graph_trains_too():
    model = zoo.MLP()
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    out, _ = first_call(compiled, torch.randn(5, 8))
    out.square().sum().backward()
    assert all(v.grad is not None and v.grad.any() for v in onelora.vectors(model).values())


def test_under_inference_mode_the_vectors_can_still_be_trained():
    model = zoo.MLP()
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    with torch.inference_mode():
        first_call(compiled, torch.randn(5, 8))
    compiled(torch.randn(5, 8)).square().sum().backward()
    assert all(v.grad is not None for v in onelora.vectors(model).values())


def test_a_copy_does_not_run_with_the_vectors_of_the_original(counter):
    model = zoo.MLP()
    x = torch.randn(5, 8)
    compiled = build(counter, model)
    first_call(compiled, x)
    fill_vectors(model, 0.5, seed=1)
    twin = fill_vectors(copy.deepcopy(model), 0.5, seed=2)
    assert not torch.allclose(twin(x), model(x))
    fast_twin = build(counter, twin)
    torch.testing.assert_close(fast_twin(x), twin(x))
    torch.testing.assert_close(compiled(x), model(x))
    assert len(counter.graphs) == 1


def test_a_second_model_of_the_same_class_is_adapted_itself(counter):
    x = torch.randn(5, 8)
    first, second = zoo.MLP().requires_grad_(False), zoo.MLP().requires_grad_(False)
    first_call(build(counter, first), x)
    fill_vectors(first, 0.5)
    expected = second(x)
    out, messages = first_call(build(counter, second), x)
    assert torch.equal(out, expected)
    assert len(messages) == 1
    assert not any(v.any() for v in onelora.vectors(second).values())


def test_a_dead_model_does_not_lend_its_graph_to_a_new_one(counter):
    x = torch.randn(5, 8)
    for seed in range(5):
        model = zoo.MLP()
        compiled = build(counter, model)
        first_call(compiled, x)
        fill_vectors(model, 0.5, seed=seed)
        torch.testing.assert_close(compiled(x), model(x))
        del model, compiled
        gc.collect()


def test_options_choose_the_config(counter):
    model = zoo.MLP()
    config = onelora.OneLoRAConfig(target_modules=["a"], modules_to_save=["c"])
    options: dict[str, Any] = {"inner": counter, "config": config}
    compiled = torch.compile(model, backend="onelora", options=options)
    first_call(compiled, torch.randn(5, 8))
    assert list(onelora.vectors(model)) == ["a"]
    assert model.c.weight.requires_grad
    compiled(torch.randn(5, 8))
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("call", ["detach", "merge"])
def test_a_model_whose_vectors_were_removed_is_not_adapted_again(call, counter):
    model = zoo.MLP()
    compiled = build(counter, model)
    x = torch.randn(5, 8)
    first_call(compiled, x)
    fill_vectors(model, 0.5)
    expected = compiled(x).detach() if call == "merge" else None
    getattr(onelora, call)(compiled)
    out, messages = first_call(compiled, x)
    assert messages == []
    assert onelora.vectors(model) == {}
    torch.testing.assert_close(out, model(x) if expected is None else expected, rtol=1e-5, atol=1e-5)


def test_a_transformers_model(counter):
    model, inputs = zoo.bert()
    base = copy.deepcopy(model)
    compiled = build(counter, model)
    out, messages = first_call(compiled, **inputs)
    torch.testing.assert_close(out.logits, base(**inputs).logits)
    assert len(messages) == 1
    assert "classifier" not in onelora.vectors(model)
    fill_vectors(model)
    torch.testing.assert_close(compiled(**inputs).logits, merged_copy(model)(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert len(counter.graphs) == 1


def test_dynamic_shapes_under_inductor():
    model = zoo.MLP()
    compiled = torch.compile(model, backend="onelora", dynamic=True, fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first_call(compiled, torch.randn(5, 8))
    fill_vectors(model, 0.5)
    for batch in (5, 7, 3):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= before + 2  # one for the first call


def test_a_weight_that_is_called_and_read_is_adapted_in_both_uses(counter):
    class Direct(zoo.MLP):
        def forward(self, x):
            return super().forward(x) + nn.functional.linear(torch.relu(self.a(x)), self.b.weight)

    model = Direct()
    compiled = build(counter, model)
    x = torch.randn(5, 8)
    base = model(x)
    out, messages = first_call(compiled, x)
    assert torch.equal(out, base)
    assert len(messages) == 1
    fill_vectors(model, 0.5)
    torch.testing.assert_close(compiled(x), merged_copy(model)(x))
    torch.testing.assert_close(model(x), merged_copy(model)(x))
    assert len(counter.graphs) == 1


def test_weights_that_are_read_are_adapted_at_the_first_call_and_guarded(counter):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.qkv = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 9))

        def forward(self, x):
            q, k, v = (x @ self.qkv).chunk(3, -1)
            return torch.nn.functional.linear(x, self.w), q * k + v

    model = Reads()
    compiled = build(counter, model)
    x = torch.randn(5, 8)
    first_call(compiled, x)
    assert {name: len(v) for name, v in onelora.vectors(model).items()} == {"w": 6, "qkv": 9}
    fill_vectors(model, 0.5)
    twin = fill_vectors(copy.deepcopy(model), 0.5, seed=3)
    for module, run in ((model, compiled), (twin, build(counter, twin))):
        for actual, expected in zip(run(x), merged_copy(module)(x), strict=True):
            torch.testing.assert_close(actual, expected)
    sum(out.sum() for out in compiled(x)).backward()
    assert all(vector.grad is not None and vector.grad.any() for vector in onelora.vectors(model).values())


def test_nothing_to_adapt_is_an_error():
    with pytest.raises(Exception, match="no linear module"):
        torch.compile(nn.Sequential(nn.Conv1d(1, 1, 1)), backend="onelora")(torch.randn(1, 1, 3))
