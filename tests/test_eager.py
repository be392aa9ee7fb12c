"""The autograd function of eager mode: the same map as the composite, and only where it is the same."""

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.adapting import eager_linear
from onelora_compile.ops import rank1_update
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def adapted(n=5, m=3, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = onelora.adapt(
        nn.Sequential(nn.Linear(n, m, bias=bias)).to(dtype), onelora.OneLoRAConfig(vector_dtype=dtype)
    )
    return fill_vectors(model, 0.5)[0]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that the function takes."""
    made: list[int] = []
    real = eager_linear.adapted_linear

    def counting(*args):
        made.append(1)
        return real(*args)

    monkeypatch.setattr(eager_linear, "adapted_linear", counting)
    return made


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (1, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(shape, bias, strided, calls):
    layer = adapted(bias=bias)
    x = torch.randn(*shape)
    if strided and x.ndim > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    up = torch.randn(*shape[:-1], 3)
    results = []
    for dtype, own in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        one, vector = (t.detach().to(dtype).requires_grad_() for t in (x, layer.onelora_vector))
        weight, c = layer._parameters["weight"].to(dtype), layer.bias.to(dtype) if bias else None
        if own:
            one, vector = one, layer.onelora_vector
            y = layer(one)
        else:
            y = nn.functional.linear(one, weight + vector[:, None], c)
        results.append((y, *torch.autograd.grad(y, (one, vector), up.to(dtype))))
    assert len(calls) == 1
    for exact, plain, actual in zip(*results, strict=True):
        assert_parity(actual, exact, plain, floor=4)


def test_gradcheck_twice():
    layer = adapted(dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, c = layer._parameters["weight"], layer.bias

    def function(x, vector):
        return eager_linear.adapted_linear(x, weight, c, vector)

    vector = layer.onelora_vector.detach().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, vector))
    assert torch.autograd.gradgradcheck(function, (x, vector))


def test_an_input_without_gradient_and_no_grad(calls):
    layer, x = adapted(), torch.randn(4, 5)
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.onelora_vector)
    torch.testing.assert_close(gradient, x.sum().expand(3))
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert len(calls) == 2


def test_the_input_is_not_written_to_and_the_output_may_be(calls):
    layer = adapted(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    before = x.detach().clone()
    layer(x).relu_().sum().backward()
    assert torch.equal(x.detach(), before)
    assert calls


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (1, 2, 4, 5), (4, 2, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_what_follows_may_write_to_the_output_in_place(shape, bias, calls):
    layer = adapted(bias=bias)
    x = torch.randn(shape)
    x = (x.transpose(0, 1) if shape == (4, 2, 5) else x).requires_grad_()

    def run(function, one):
        y = function(one)
        y /= 2
        y[..., 0] += 1
        return nn.functional.relu(y, inplace=True).square().sum()

    def merged(dtype):
        one = x.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(run(merged_copy(nn.Sequential(layer), dtype).get_submodule("0"), one), one)[0]

    found, moved = torch.autograd.grad(run(layer, x), (x, layer.onelora_vector))
    assert_parity(found, merged(torch.float64), merged(torch.float32), floor=4)
    assert moved.any()
    assert calls


def trained_weight(layer, x):
    layer._parameters["weight"].requires_grad_()
    return layer(x)


def trained_bias(layer, x):
    layer.bias.requires_grad_()
    return layer(x)


def autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def forward_mode(layer, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y, tangent = torch.autograd.forward_ad.unpack_dual(layer(dual))
        torch.testing.assert_close(
            tangent, rank1_update(x.new_ones(4, 5) @ layer.weight.T, x * 0 + 1, layer.onelora_vector)
        )
        return y


def mapped(layer, x):
    return torch.func.vmap(layer)(x)


def in_a_mode(layer, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return layer(x)


def traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)(x)


def half(layer, x):
    return layer.to(torch.bfloat16)(x.bfloat16())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "call", [trained_weight, trained_bias, autocast, forward_mode, mapped, in_a_mode, traced, half]
)
def test_what_goes_to_the_composite_operator(call, calls):
    layer, x = adapted(), torch.randn(4, 5)
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.weight + layer.onelora_vector[:, None], layer.bias)
    y = call(layer, x)
    assert not calls
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 if call in (autocast, half) else 1e-5)


def test_a_subclass_with_a_forward_of_its_own(calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = fill_vectors(onelora.adapt(nn.Sequential(Doubled(5, 3))), 0.5)
    x = torch.randn(4, 5)
    held = dict(model[0].named_parameters())
    base = 2 * nn.functional.linear(x, held["weight"], held["bias"])
    torch.testing.assert_close(model(x), base + x.sum(-1, keepdim=True) * held["onelora_vector"])
    assert not calls
