"""PyTorch's own ways to take a model apart: right on an adapted one, or refused by name; with other values too."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is on its way out


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.tanh(nn.functional.linear(x, self.w)))


MODELS = {"called": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), "read": Read}
CAPTURES = {
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "torch.fx.symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module(),
}


def adapted(name):
    torch.manual_seed(0)
    return fill_vectors(onelora.adapt(MODELS[name]().eval()), 0.3)


@pytest.mark.parametrize("how", CAPTURES)
@pytest.mark.parametrize("name", MODELS)
def test_captures_are_right_with_other_inputs_and_values(name, how):
    model, x = adapted(name), torch.randn(5, 8)
    if (name, how) == ("read", "torch.fx.symbolic_trace"):
        with pytest.raises(onelora.StateError, match="can't follow OneLoRARead, which reads its weight 'w'"):
            torch.fx.symbolic_trace(model)
        return
    captured = CAPTURES[how](model, torch.randn(5, 8))
    torch.testing.assert_close(captured(x), merged_copy(model)(x))
    if how != "torch.export":  # whose program has parameters of its own
        fill_vectors(model, 0.3, seed=1)
        torch.testing.assert_close(captured(x), merged_copy(model)(x))


@pytest.mark.parametrize("name", MODELS)
def test_torch_onnx_export(name, tmp_path):
    model, x = adapted(name), torch.randn(5, 8)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), merged_copy(model)(x))


@pytest.mark.parametrize("name", MODELS)
def test_torch_onnx_export_by_torchscript_names_our_operator(name, tmp_path):
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="onelora::"):
        torch.onnx.export(adapted(name), (torch.randn(5, 8),), tmp_path / "m.onnx", dynamo=False)


@pytest.mark.parametrize("name", MODELS)
def test_torch_jit_script(name):
    model, x = adapted(name), torch.randn(5, 8)
    with pytest.raises(onelora.StateError, match=r"torch.jit.script can't compile .* call onelora.merge on a copy"):
        torch.jit.script(model)
    expected, merged = model(x), copy.deepcopy(model)
    onelora.merge(merged)
    torch.testing.assert_close(torch.jit.script(merged)(x), expected)


def norm(kind):
    made = kind(8).eval()
    with torch.no_grad():
        made.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize(
    ("layer", "kind", "fuse", "shape"),
    [
        (lambda: nn.Linear(8, 8), nn.BatchNorm1d, fuse_linear_bn_eval, (5, 8)),
        (lambda: nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d, fuse_conv_bn_eval, (2, 3, 8, 8)),
    ],
    ids=["linear", "patches"],
)
def test_a_norm_is_fused_after_merging(layer, kind, fuse, shape):
    model, x = nn.Sequential(layer(), norm(kind)).eval(), torch.randn(shape)
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["0"])), 0.3)
    expected = model(x)
    with pytest.raises(onelora.StateError, match="can't fuse a norm into an adapted module"):
        fuse(*model)
    copy.deepcopy(model), copy.copy(model[0])
    onelora.merge(model)
    torch.testing.assert_close(fuse(*model)(x), expected, rtol=1e-4, atol=1e-5)
