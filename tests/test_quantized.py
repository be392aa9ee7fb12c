"""Bases that are quantised, and modules of unknown classes that behave like a linear."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def quantize(model, how):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    # The int4 formats with kernels of their own need a GPU; this one runs everywhere.
    four_bits = torch.int4  # type: ignore[attr-defined]  # torch makes it at run time
    int4 = IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(32))
    quantize_(model, Int8WeightOnlyConfig() if how == "int8" else int4)
    return model


def updated(base, model, x):
    """The reference: outputs of the quantised base's own linears, plus the update."""
    vectors = onelora.vectors(model)
    h = torch.relu(base.a(x).double() + x.double().sum(-1, keepdim=True) * vectors["a"].double()).to(x.dtype)
    return base.b(h).double() + h.double().sum(-1, keepdim=True) * vectors["b"].double()


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("order", ["quantize_then_adapt", "adapt_then_quantize"])
def test_torchao_weight_only(how, order, tmp_path):
    torch.manual_seed(0)
    original = Net().bfloat16().eval()
    base = quantize(copy.deepcopy(original), how)
    if order == "quantize_then_adapt":
        model = onelora.adapt(copy.deepcopy(base))
    else:
        model = quantize(onelora.adapt(copy.deepcopy(original)), how)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(model(x), base(x))
    fill_vectors(model, 0.05)
    expected = updated(base, model, x)
    scale = expected.abs().max()
    for run in (model, torch.compile(model, backend="onelora", options={"inner": "aot_eager"})):
        assert (run(x).double() - expected).abs().max() < 2e-2 * scale
        assert (run(x).double() - base(x).double()).abs().max() > 0.1 * scale
        out = run(x).float().sum()
        gradients = torch.autograd.grad(out, list(onelora.vectors(model).values()))
        assert all(gradient.any() for gradient in gradients)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = onelora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), model(x))
    # The adapter of a quantised base fits the base that was quantised, and no other.
    onelora.load_adapter(copy.deepcopy(original), tmp_path / "a.safetensors")
    torch.manual_seed(5)
    with pytest.raises(onelora.BaseMismatchError):
        onelora.load_adapter(quantize(Net().bfloat16(), how), tmp_path / "a.safetensors")
    with pytest.raises(onelora.MergeError, match="quantised or packed"):
        onelora.merge(model)
    assert onelora.vectors(model)
    assert torch.equal(onelora.detach(model)(x), base(x))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
def test_torch_ao_dynamic(dtype, tmp_path):
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    original = Net().eval()
    base, x = quantize_dynamic(original, {nn.Linear}, dtype=dtype), torch.randn(7, 64)
    trained = fill_vectors(onelora.adapt(copy.deepcopy(original)), 0.05)
    onelora.save_adapter(trained, tmp_path / "a.safetensors")
    model = onelora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert onelora.summary(model).sites == [("a", 64, 128), ("b", 128, 64)]
    assert "the base has 0 base parameters" in str(onelora.summary(model))
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), updated(base, model, x), rtol=1e-4, atol=1e-4)
        fast = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
        torch.testing.assert_close(fast(x), model(x))
        assert (model(x) - trained(x)).abs().max() < 0.05 * trained(x).abs().max()
        with onelora.disabled(model):
            assert torch.equal(model(x), base(x))
    with pytest.raises(onelora.MergeError, match="quantised or packed"):
        onelora.merge(model)
    assert torch.equal(onelora.detach(model)(x), base(x))
    assert type(model.a) is type(base.a)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_what_torch_ao_quantises_and_is_no_linear_of_floats_is_left_out_with_the_reason():
    import torch.ao.nn.intrinsic.quantized.dynamic as fused
    import torch.ao.nn.quantized as quantized

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), quantized.Linear(8, 8), fused.LinearReLU(8, 3))
    layers: Any = model
    for layer in layers[1:]:  # as they are made, their weights are whatever was in memory
        weight = torch.quantize_per_tensor(torch.randn(layer.out_features, 8), 0.05, 0, torch.qint8)
        layer.set_weight_bias(weight, torch.zeros(layer.out_features))
    onelora.adapt(model)
    reasons = onelora.summary(model).skipped
    assert reasons["1"].startswith("it has in_features and out_features, but a call with one tensor failed: Could not")
    assert len(reasons["1"]) < 200
    assert reasons["2"] == "it has in_features and out_features, but its output is not linear in its input"


class Packed(nn.Module):
    """What quantisation libraries make: in_features and out_features, integer weights in buffers, no nn.Linear."""

    bias: torch.Tensor

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, input):
        return nn.functional.linear(input, self.qweight.to(input.dtype) * self.scale, self.bias)


class Cosine(nn.Module):
    """Has the sizes of a linear and is none."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), nn.functional.normalize(self.weight, dim=-1))


class Own(nn.Module):
    """A linear of an own class, stored the other way round."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.in_features, self.out_features, self.scale = 8, 8, scale
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ (self.weight * self.scale)


def test_a_packed_linear_of_an_unknown_class(tmp_path):
    linear = nn.Linear(16, 12)
    base = nn.Sequential(Packed(linear), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(5, 16)
    model = onelora.adapt(copy.deepcopy(base))
    assert list(onelora.vectors(model)) == ["0", "2"]
    assert torch.equal(model(x), base(x))
    fill_vectors(model, 0.1)
    v = onelora.vectors(model)
    h = torch.relu(base[0](x) + x.sum(-1, keepdim=True) * v["0"])
    expected = base[2](h) + h.sum(-1, keepdim=True) * v["2"]
    for run in (model, torch.compile(model, backend="onelora", options={"inner": "eager"})):
        torch.testing.assert_close(run(x), expected)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    # The same layer, not packed: the fingerprint is that of what the module does.
    plain = nn.Sequential(linear, nn.ReLU(), base[2])
    torch.testing.assert_close(
        onelora.load_adapter(plain, tmp_path / "a.safetensors")(x), expected, rtol=0.05, atol=0.05
    )
    with pytest.raises(onelora.MergeError, match="Packed does not keep W as a plain tensor"):
        onelora.merge(model)


def test_what_only_looks_like_a_linear_is_left_out_with_the_reason():
    model = onelora.adapt(nn.Sequential(nn.Linear(8, 8), Cosine()))
    assert onelora.summary(model).skipped == {
        "1": "it has in_features and out_features, but its output is not linear in its input"
    }


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_linear_of_an_own_class_is_known_by_what_it_does(scale, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), Own(scale))
    x = torch.randn(5, 8)
    base = copy.deepcopy(model)
    fill_vectors(onelora.adapt(model), 0.3)
    v = onelora.vectors(model)
    h = base[0](x) + x.sum(-1, keepdim=True) * v["0"]
    expected = base[1](h) + h.sum(-1, keepdim=True) * v["1"]
    torch.testing.assert_close(model(x), expected)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(onelora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(x), model(x))
    if scale == 1.0:
        onelora.merge(model)
        torch.testing.assert_close(model(x), expected)
    else:  # W is not what the parameter holds
        with pytest.raises(onelora.MergeError, match="Own computes something else than W x"):
            onelora.merge(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_recurrent_layers_and_embeddings_of_torch_ao_are_named():
    from torch.ao.quantization import float_qparams_weight_only_qconfig, quantize_dynamic

    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "cell": nn.GRUCell(8, 8), "table": nn.Embedding(9, 8)})
    model = quantize_dynamic(model, {nn.LSTM, nn.GRUCell}, dtype=torch.qint8)
    model = quantize_dynamic(model, {nn.Embedding: float_qparams_weight_only_qconfig}, dtype=torch.quint8)
    onelora.adapt(model.add_module("head", nn.Linear(8, 3)) or model)
    report = onelora.summary(model)
    assert list(onelora.vectors(model)) == ["head"]
    assert "recurrent" in report.skipped["rnn"]
    assert "recurrent" in report.skipped["cell"]
    assert report.not_linear["table"].startswith("an embedding")
