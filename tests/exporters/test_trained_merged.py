"""Trained layers in files whose exporter or optimizer merged a norm or a factor into them: right, or refused."""

import copy

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import OnnxRunner, fold_onnx

onnx = pytest.importorskip("onnx")


def moved(norm):
    """A batch norm with statistics."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


class Model(nn.Module):
    """A trained layer `c`, what tools merge into it, and a trained head."""

    def __init__(self, layer, behind, features, first=None):
        super().__init__()
        self.a, self.c, self.behind = first or nn.Linear(8, 8), layer, behind
        self.classifier = nn.Linear(features, 3)

    def forward(self, x):
        y = torch.tanh(self.behind(self.c(torch.tanh(self.a(x)))))
        return self.classifier(y.movedim(1, -1) if y.ndim > 2 and y.shape[1] == 4 else y)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x):
        return x * self.factor


MODELS = {
    "convolution, norm": (lambda: Model(nn.Conv2d(3, 4, 3), moved(nn.BatchNorm2d(4)), 4), (2, 3, 8, 8)),
    "1-D convolution, norm": (lambda: Model(nn.Conv1d(3, 4, 3), moved(nn.BatchNorm1d(4)), 4), (2, 3, 8)),
    "transposed, norm": (
        lambda: Model(nn.ConvTranspose2d(3, 4, 3, bias=False), moved(nn.BatchNorm2d(4)), 4), (2, 3, 8, 8),
    ),
    "convolution, factors": (lambda: Model(nn.Conv2d(3, 4, 3), Times(torch.rand(4, 1, 1) + 0.5), 4), (2, 3, 8, 8)),
    "linear, norm": (lambda: Model(nn.Linear(8, 8), moved(nn.BatchNorm1d(8)), 8), (4, 8)),
    "linear, scale": (lambda: Model(nn.Linear(8, 8), Times(torch.tensor(0.25)), 8), (2, 5, 8)),
    "linear without bias, scale": (lambda: Model(nn.Linear(8, 8, bias=False), Times(torch.tensor(0.25)), 8), (2, 5, 8)),
}  # fmt: skip


def exported(model, x, exporter, tool, path):
    if exporter == "script":
        torch.onnx.export(model, (x,), path, dynamo=False, opset_version=17)
    else:
        torch.onnx.export(model, (x,), path, dynamo=True, optimize="raw" not in exporter, verbose=False)
    if tool == "onnxslim":
        onnx.save(pytest.importorskip("onnxslim").slim(onnx.load(path)), path)
    elif tool == "onnxsim":
        onnx.save(pytest.importorskip("onnxsim").simplify(onnx.load(path))[0], path)


SLOW = [(e, t) for e in ("script", "dynamo", "dynamo raw") for t in ("none", "onnxslim", "onnxsim")]
WAYS = [pytest.param(*one, marks=() if one == ("script", "onnxslim") else pytest.mark.slow) for one in SLOW]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("exporter", "tool"), WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_tool_merged_is_never_lost(name, exporter, tool, tmp_path):
    torch.manual_seed(1)
    make, shape = MODELS[name]
    base, x = make().eval(), torch.randn(*shape)
    exported(base, x, exporter, tool, tmp_path / "base.onnx")
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(modules_to_save=("c", "classifier")))
    with torch.no_grad():
        for one in onelora.trainable_parameters(model):
            one.add_(0.3 * torch.randn_like(one))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    refused = None
    try:
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    except ExportError as error:
        refused = str(error)
    if refused is not None:
        assert tool != "none" or (exporter != "dynamo raw" and "norm" in name)  # something was merged
        assert "c.weight" in refused
        assert not (tmp_path / "out.onnx").exists()
        return
    (found,) = OnnxRunner(tmp_path / "out.onnx").run([x.numpy()])
    expected = model.double()(x.double()).detach()
    distance = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
    assert distance < 2e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("outputs", [1, 2, 5, 40])
def test_a_new_head_is_no_merged_one(outputs, zeros, tmp_path):
    """Whatever numbers two processes draw for it."""
    for seed in range(4):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, outputs))
        if zeros:
            nn.init.zeros_(base.get_parameter("2.bias"))
        other = copy.deepcopy(base)
        nn.init.kaiming_uniform_(other.get_parameter("2.weight"), 5**0.5)
        if not zeros:
            nn.init.uniform_(other.get_parameter("2.bias"), -0.25, 0.25)
        x = torch.randn(3, 8)
        torch.onnx.export(other, (x,), tmp_path / "base.onnx", dynamo=False)
        model = onelora.adapt(base, onelora.OneLoRAConfig(modules_to_save=("2",)))
        onelora.save_adapter(model, tmp_path / "a.safetensors")
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
        (found,) = OnnxRunner(tmp_path / "out.onnx").run([x.numpy()])
        torch.testing.assert_close(torch.from_numpy(found), base(x).detach())
