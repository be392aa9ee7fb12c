"""A fold beside int4 products whose activations ONNX Runtime rounds to int8: accuracy_level 4.

genai's builder writes that by default. Rounded are the base's products alone: the vectors see activations as they are.
"""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_graphs import assert_arrays

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors

WIDE, OUT = 256, 96
INT8 = 4


def quantized(source, path, symmetric, level):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    one = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=symmetric, accuracy_level=level)
    one.process()
    one.model.save_model_to_file(str(path))
    return path


def run(path, x):
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_fold_adds_nothing_to_what_the_base_rounds(symmetric, tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(WIDE, OUT, bias=False)).eval()
    given = torch.randn(1, 32, WIDE) + 0.2
    given[..., ::97] *= 10  # outliers are what rounding hurts by
    export_onnx(base, (given,), tmp_path / "base.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.02)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    x: np.ndarray = given.numpy()
    exact = quantized(tmp_path / "base.onnx", tmp_path / "exact.onnx", symmetric, 1)
    rounded = quantized(tmp_path / "base.onnx", tmp_path / "rounded.onnx", symmetric, INT8)
    fold_onnx(rounded, tmp_path / "a.safetensors", tmp_path / "folded.onnx", progress=False)
    own = run(rounded, x)
    lost = np.abs(own - run(exact, x)).max()
    assert lost > 1e-3 * np.abs(own).max()  # it does round
    b = onelora.vectors(model)["0"].detach().numpy()
    update = x.astype(np.float64).sum(-1, keepdims=True) * b
    assert_arrays(run(tmp_path / "folded.onnx", x), own + update, own + x.sum(-1, keepdims=True) * b)
