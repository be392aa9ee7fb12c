"""adapt, vectors, trainable_parameters, detach: what they promise on every ordinary linear."""

import copy
import io
import pickle

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy


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


@pytest.mark.parametrize("order", ["adapt_then_to", "to_then_adapt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_works_before_and_after_to(order, dtype):
    model = zoo.MLP()
    x = torch.randn(5, 8, dtype=dtype)
    model = onelora.adapt(model).to(dtype) if order == "adapt_then_to" else onelora.adapt(model.to(dtype))
    expected_dtype = dtype if order == "adapt_then_to" or dtype == torch.float64 else torch.float32
    assert {v.dtype for v in onelora.vectors(model).values()} == {expected_dtype}
    fill_vectors(model, 0.5)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(x), merged_copy(model)(x), **tolerance)


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


@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_any_input_shape(shape, requires_grad):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(shape, requires_grad=requires_grad)
    twin = merged_copy(model)
    torch.testing.assert_close(model(x), twin(x))
    model(x).sum().backward()
    assert (x.grad is not None) == requires_grad
    if requires_grad:
        grad, x.grad = x.grad, None
        twin(x).sum().backward()
        torch.testing.assert_close(grad, x.grad)


def test_non_contiguous_input_and_inference_mode():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(8, 5).T
    with torch.inference_mode():
        torch.testing.assert_close(model(x), merged_copy(model)(x))


def test_adapted_in_inference_mode_can_still_be_trained():
    model = zoo.MLP()
    with torch.inference_mode():
        onelora.adapt(model)
        with onelora.disabled(model):
            model(torch.randn(5, 8))
    train(model, {"x": torch.randn(5, 8)})
    assert all(v.any() for v in onelora.vectors(model).values())


def test_input_as_keyword():
    linear = nn.Sequential(nn.Linear(4, 3))
    model = fill_vectors(onelora.adapt(linear), 1.0)
    x = torch.randn(2, 4)
    assert torch.equal(model[0](input=x), model[0](x))


def forward_this(this, x):
    return torch.nn.functional.linear(x, this.weight, this.bias)


def forward_of_keywords(self, *args, **kwargs):
    return nn.Linear.forward(self, *args, **kwargs)


@pytest.mark.parametrize(("forward", "name"), [(forward_this, "x"), (forward_of_keywords, "input")])
def test_input_as_keyword_of_a_forward_of_its_own(forward, name):
    model = nn.Sequential(type("Own", (nn.Linear,), {"forward": forward})(4, 3))
    fill_vectors(onelora.adapt(model), 1.0)
    x = torch.randn(2, 4)
    assert torch.equal(model[0](**{name: x}), model[0](x))


def test_a_call_that_is_no_map_of_the_last_axis_is_refused_by_name():
    class FirstOfMany(nn.Linear):
        def forward(self, x):
            return super().forward(x[..., :1, :].clamp(-1) if x.ndim == 6 else x)  # more axes than are probed

    model = fill_vectors(onelora.adapt(nn.Sequential(FirstOfMany(4, 4))), 1.0)
    with pytest.raises(TypeError, match=r"FirstOfMany.*exclude_modules"):
        model(torch.randn(1, 1, 1, 2, 3, 4))


def test_subclass_of_linear_keeps_its_own_forward_and_class():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model = nn.Sequential(Scaled(4, 3))
    x = torch.randn(2, 4)
    expected = model[0](x, scale=2.0)
    onelora.adapt(model)
    assert isinstance(model[0], Scaled)
    assert torch.equal(model[0](x, scale=2.0), expected)
    with torch.no_grad():
        onelora.vectors(model)["0"].fill_(1.0)
    torch.testing.assert_close(model[0](x, scale=2.0), expected + x.sum(-1, keepdim=True))
    onelora.detach(model)
    assert type(model[0]) is Scaled


def test_a_linear_that_returns_a_tuple_is_adapted_by_its_weight():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model, x = fill_vectors(onelora.adapt(nn.Sequential(Pair(4, 3)))), torch.randn(2, 4)
    y, _ = model(x)
    torch.testing.assert_close(y, merged_copy(model)(x)[0])


def test_one_module_called_twice_has_one_vector():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.same = self.fc

        def forward(self, x):
            return self.same(torch.relu(self.fc(x)))

    model = fill_vectors(onelora.adapt(Twice()), 0.5)
    assert list(onelora.vectors(model)) == ["fc"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), merged_copy(model)(x))


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


def test_symbolic_trace_of_an_adapted_model():
    model, x = fill_vectors(onelora.adapt(zoo.MLP()), 0.5), torch.randn(5, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


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
        onelora.adapt("model")


def test_a_compiled_model_is_accepted_everywhere(tmp_path):
    model = torch.compile(zoo.MLP(), backend="eager")
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
    model[0] = torch.compile(model[0], backend="eager")
    assert list(onelora.vectors(onelora.adapt(model))) == ["0.a", "0.b", "0.c", "1"]
    detached = onelora.detach(model)
    assert all(p.requires_grad for p in detached.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_path_of_transformer_layers_does_not_drop_the_vectors(padded, compiled):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    mask = {"src_key_padding_mask": torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None]} if padded else {}
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5)
    reference = merged_copy(model)
    run = torch.compile(model, backend="onelora", options={"inner": "eager"}) if compiled else model
    keep = ~mask["src_key_padding_mask"] if padded else torch.ones(3, 5, dtype=torch.bool)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(run(x, **mask)[keep], reference(x, **mask)[keep], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(model(x, **mask)[keep], base(x, **mask)[keep], atol=1e-2)
    twin = copy.deepcopy(model)
    for detached in (onelora.detach(twin), onelora.detach(model)):
        assert [layer.activation_relu_or_gelu for layer in detached.layers] == [1, 1]
        assert detached.use_nested_tensor == base.use_nested_tensor


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
