"""export_onnx: what it refuses is named, and leaves the files as they were."""

import os

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors


def test_bfloat16_says_how_to_go_on(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP().bfloat16()), 0.1)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with pytest.raises(onelora.ExportError, match="verify=False"):
        export_onnx(model, (x,), tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == []
    export_onnx(model, (x,), tmp_path / "a.onnx", verify=False)


@pytest.mark.parametrize("external", [True, False])
def test_failed_verification_leaves_the_old_file(external, tmp_path, monkeypatch):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(4, 8)
    path = tmp_path / "a.onnx"
    export_onnx(model, (x,), path, external_data=external)
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}

    def wrong(weight, vector, *rest):
        from onelora_compile.weights.merge import fold_weight

        return fold_weight(weight, vector * 1.1, *rest)

    monkeypatch.setattr("onelora_compile.passes.exported.fold_vectors.fold_weight", wrong)
    with pytest.raises(
        onelora.ExportError, match=r"differs from MLP with its vectors: output .* is allowed; nothing was written"
    ):
        export_onnx(model, (x,), path, external_data=external)
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


def test_an_error_of_the_check_names_the_input_and_no_temporary_name(tmp_path):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.real) + self.linear(x.imag)

    with pytest.raises(onelora.ExportError, match=r"input 'x' takes float32 \[2, 4, 2\].*complex64") as error:
        export_onnx(Complex(), (torch.randn(2, 4, dtype=torch.complex64),), tmp_path / "m.onnx")
    assert ".onelora-" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_can_not_be_captured_is_named(tmp_path):
    class Branch(zoo.MLP):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(onelora.ExportError, match=r"torch\.export can't capture Branch"):
        export_onnx(onelora.adapt(Branch()), (torch.randn(4, 8),), tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == []


def test_a_weight_that_is_computed_can_not_be_folded(tmp_path):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    fill_vectors(onelora.adapt(model), 0.5)
    with pytest.raises(onelora.PassError, match=r"'0': its weight is computed in the graph"):
        export_onnx(model, (torch.randn(2, 4),), tmp_path / "a.onnx")


def test_unknown_mode_missing_folder_and_missing_extra(tmp_path, monkeypatch):
    model, x = onelora.adapt(zoo.MLP()), torch.randn(4, 8)
    with pytest.raises(onelora.ConfigError, match=r"adapters='banks' is not one of 'fold'"):
        export_onnx(model, (x,), tmp_path / "a.onnx", adapters="banks")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export_onnx(model, (x,), tmp_path / "no" / "a.onnx")
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(onelora.MissingExtraError, match=r"onelora-compile\[onnx\]"):
        export_onnx(model, (x,), tmp_path / "a.onnx")
