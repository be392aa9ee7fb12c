"""An adapted linear is called in any way that the linear was: shapes, dtypes, keywords, forwards of its own."""

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def assert_right(found, model, x):
    """By merged weights in float64, no more wrong than by merged weights in their own dtype."""
    exact = merged_copy(model, torch.float64)(x.double())
    floor = 4.0 if found.dtype == torch.float64 else 1.0  # where the oracle rounds as well
    assert_parity(found, exact, merged_copy(model)(x), floor=floor)


@pytest.mark.parametrize("order", ["adapt_then_to", "to_then_adapt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_works_before_and_after_to(order, dtype):
    model = zoo.MLP()
    x = torch.randn(5, 8, dtype=dtype)
    model = onelora.adapt(model).to(dtype) if order == "adapt_then_to" else onelora.adapt(model.to(dtype))
    expected_dtype = dtype if order == "adapt_then_to" or dtype == torch.float64 else torch.float32
    assert {v.dtype for v in onelora.vectors(model).values()} == {expected_dtype}
    fill_vectors(model, 0.5)
    assert_right(model(x), model, x)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_any_input_shape(shape, requires_grad):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(shape, requires_grad=requires_grad)
    assert_right(model(x), model, x)
    model(x).sum().backward()
    assert (x.grad is not None) == requires_grad
    if x.grad is not None:
        twins = ((merged_copy(model, dtype), x.detach().to(dtype)) for dtype in (torch.float64, x.dtype))
        exact, plain = (torch.func.grad(lambda x, twin=twin: twin(x).sum())(given) for twin, given in twins)
        assert_parity(x.grad, exact, plain)


def test_non_contiguous_input_and_inference_mode():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(8, 5).T
    with torch.inference_mode():
        assert_right(model(x), model, x)


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
    expected, exact = model[0](x, scale=2.0), copy.deepcopy(model).double()[0](x.double(), scale=2.0)
    onelora.adapt(model)
    assert isinstance(model[0], Scaled)
    assert torch.equal(model[0](x, scale=2.0), expected)
    with torch.no_grad():
        onelora.vectors(model)["0"].fill_(1.0)
    sums = x.double().sum(-1, keepdim=True)
    assert_parity(model[0](x, scale=2.0), exact + sums, expected + sums.float())
    onelora.detach(model)
    assert type(model[0]) is Scaled


def test_a_linear_that_returns_a_tuple_is_adapted_by_its_weight():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model, x = fill_vectors(onelora.adapt(nn.Sequential(Pair(4, 3)))), torch.randn(2, 4)
    y, _ = model(x)
    assert_parity(y, merged_copy(model, torch.float64)(x.double())[0], merged_copy(model)(x)[0])


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
    assert_right(model(x), model, x)


def test_symbolic_trace_of_an_adapted_model():
    model, x = fill_vectors(onelora.adapt(zoo.MLP()), 0.5), torch.randn(5, 8)
    assert_right(torch.fx.symbolic_trace(model)(x), model, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_path_of_transformer_layers_does_not_drop_the_vectors(padded, compiled):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    mask = {"src_key_padding_mask": torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None]} if padded else {}
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5)
    merged, exact = merged_copy(model), merged_copy(model, torch.float64)
    run = torch.compile(model, backend="onelora", options={"inner": "eager"}) if compiled else model
    keep = ~mask["src_key_padding_mask"] if padded else torch.ones(3, 5, dtype=torch.bool)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert_parity(run(x, **mask)[keep], exact(x.double(), **mask)[keep], merged(x, **mask)[keep])
            assert not torch.allclose(model(x, **mask)[keep], base(x, **mask)[keep], atol=1e-2)
    with torch.no_grad(), onelora.disabled(model):  # the base's own fused path gives zeros for the others
        wide = copy.deepcopy(base).double()(x.double(), **mask)
        assert_parity(run(x, **mask)[keep], wide[keep], base(x, **mask)[keep])
        assert not padded or (not base(x, **mask)[~keep].any() and bool(model(x, **mask)[~keep].any()))
    twin = copy.deepcopy(model)
    for detached in (onelora.detach(twin), onelora.detach(model)):
        assert [layer.activation_relu_or_gelu for layer in detached.layers] == [1, 1]
        assert detached.use_nested_tensor == base.use_nested_tensor


@pytest.mark.parametrize("end", ["detach", "merge"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_a_tool_has_wrapped_outlives_the_vector(end, compiled):
    model, x = fill_vectors(onelora.adapt(zoo.MLP()), 0.5), torch.randn(5, 8)
    expected = {"detach": onelora.detach(copy.deepcopy(model))(x), "merge": merged_copy(model)(x)}[end]
    held: Any = model.a.forward
    if compiled:
        held = torch.compile(held, backend="onelora", options={"inner": "aot_eager"})
    vars(model.a)["forward"] = lambda given: held(given)  # as diffusers' hooks do, for offloading and layerwise casting
    torch.testing.assert_close(model(x), merged_copy(model)(x))
    getattr(onelora, end)(model)
    torch.testing.assert_close(model(x), expected)
