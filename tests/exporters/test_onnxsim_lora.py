"""LoRA that onnxsim trains in an ONNX file: a vector goes in beside it, and it is no adapter of vectors itself."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxsim import lora
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

pytestmark = pytest.mark.filterwarnings("ignore")  # its own


@pytest.fixture
def trained(tmp_path):
    """A base, and its file with LoRA of rank 1 that was trained there from factors A of ones."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(8, 16)
    export_onnx(base, (x,), tmp_path / "base.onnx")
    model, adapter = lora.inject_lora(str(tmp_path / "base.onnx"), rank=1)
    for held in model.graph.initializer:
        if held.name.endswith("lora_A"):
            held.CopyFrom(numpy_helper.from_array(np.ones(tuple(held.dims), np.float32), held.name))
    ends = model.graph.input[0].name, model.graph.output[0].name
    data = {"target_data": [torch.randn(8, 4).numpy()], "calibration_data": [{ends[0]: x.numpy()}]}
    model = lora.train_lora(model, adapter, *ends, num_iterations=20, learning_rate=1e-2, **data)
    onnx.save(model, tmp_path / "trained.onnx")
    lora.export_lora_adapter(model, adapter, str(tmp_path / "theirs.onnx_adapter"))
    factors = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer if ".lora_" in one.name}
    return base, x, {name: torch.tensor(value, dtype=torch.float64) for name, value in factors.items()}


def test_its_factors_are_no_vectors(trained, tmp_path):
    base, x, factors = trained
    for name in ("0.weight", "2.weight"):
        assert factors[f"{name}.lora_A"].std() > 0.03  # A is trained too
    export_onnx(onelora.adapt(base), (x,), tmp_path / "input.onnx", adapters="input")
    with pytest.raises(onelora.AdapterFileError, match="has other vectors than the model"):
        convert_adapter(tmp_path / "theirs.onnx_adapter", tmp_path / "b.safetensors", like=tmp_path / "input.onnx")


def test_a_vector_goes_in_beside_them(trained, tmp_path):
    base, x, factors = trained
    model = fill_vectors(onelora.adapt(base), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    report = fold_onnx(tmp_path / "trained.onnx", tmp_path / "a.safetensors", tmp_path / "both.onnx")
    assert set(report.folded) == {"0", "2"}
    exact = merged_copy(model, torch.float64)
    with torch.no_grad():
        for name in ("0", "2"):
            lora_a, lora_b = (factors[f"{name}.weight.lora_{one}"] for one in "AB")
            exact.get_submodule(name).weight += (lora_a @ lora_b).T
    (found,) = onnxruntime.InferenceSession(tmp_path / "both.onnx").run(None, {"input": x.numpy()})
    assert_parity(torch.from_numpy(found), exact(x.double()), merged_copy(exact, torch.float32)(x), floor=8)
