"""The small number that guards a division or a logarithm stays in what is exported."""

import importlib
import math

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.exporters.to_onnx.small_constants import small_constants_kept
from onelora_compile.testing import assert_parity, fill_vectors


class Guarded(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.fc, self.use = nn.Linear(16, 8, bias=False), use

    def forward(self, x):
        return self.use(self.fc(x))


GUARDS = {
    "norm": lambda h, e: h / (h.norm(dim=-1, keepdim=True) + e),
    "norm, on the left": lambda h, e: h / (e + h.norm(dim=-1, keepdim=True)),
    "logarithm": lambda h, e: torch.log(torch.relu(h).sum(-1, keepdim=True) + e),
    "taken away": lambda h, e: 1 / (-h.square().sum(-1, keepdim=True) - e),
}


@pytest.mark.parametrize("epsilon", [1e-7, 1e-8, 1e-9, 1e-12])
@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("mode", ["fold", "input"])
def test_a_row_of_zeros_is_what_it_is_in_eager(mode, name, epsilon, tmp_path):
    torch.manual_seed(0)
    model = fill_vectors(onelora.adapt(Guarded(lambda h: GUARDS[name](h, epsilon)).eval()), 0.05)
    x = torch.randn(3, 16)
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode, progress=False)
    assert importlib.import_module("onnxscript.rewriter._matcher").math is math  # as it was
    x[1] = 0
    found = torch.from_numpy(OnnxRunner(tmp_path / "m.onnx").run([x.numpy()])[0])
    with torch.no_grad():
        plain = model(x)
        assert plain.isfinite().all()
        assert_parity(found, model.double()(x.double()), plain)


def test_an_onnxscript_that_compares_in_another_way_is_told(monkeypatch):
    monkeypatch.delattr("onnxscript.rewriter._matcher.math")
    with pytest.warns(onelora.OneLoRAWarning, match="may drop numbers of 1e-8 and below"), small_constants_kept():
        pass
