"""Known faults of TensorRT where engines are built and tested, behind a double of TensorRT."""

import base64
import json
import sys

import bundles
import cudart_double
import engines
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tensorrt_double
import torch

from onelora_compile.exporters import build_engine
from onelora_compile.exporters.faults.split_scale import split_scales
from onelora_compile.exporters.tensorrt import library

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")


@pytest.fixture
def cudart(tmp_path):
    return cudart_double.compile_cudart(tmp_path)


def broken(folder):
    """Let the engine compute something else, as a miscompiled one does."""
    assert len(bundles.plans(folder)) == 1
    bundles.change_engines(folder, _add_to_the_bias)


def _add_to_the_bias(model):
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(3), bias.name))


@pytest.mark.parametrize(
    ("jetpack", "version", "said"),
    [
        ("7.2", "10.5.0", "known fault: attention whose scale is split"),
        ("6.2", "10.3.0", "no fault that is known of tensorrt 10.3.0"),
    ],
)
def test_the_self_test_says_which_known_fault_fits(jetpack, version, said, tmp_path, monkeypatch, capsys, cudart):
    folder = bundles.fresh("fold", tmp_path, jetpack)
    trt = tensorrt_double.module(rtx)
    trt.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert bundles.run(folder, "--libcudart", cudart, "build") == 0
    assert bundles.run(folder, "--libcudart", cudart, "selftest") == 0
    assert "known" not in capsys.readouterr().out
    broken(folder)
    assert bundles.run(folder, "--libcudart", cudart, "selftest") == 1
    text = capsys.readouterr().out
    assert said in text
    assert ("make the bundle or the engine again" in text) == ("known fault:" in text)


@pytest.mark.parametrize("mode", ["fold", "input", "bank"])
@pytest.mark.parametrize(("version", "rewritten"), [("10.3.0", True), ("10.8.0", False)])
def test_build_engine_rewrites_for_its_own_release(version, rewritten, mode, tmp_path, monkeypatch):
    trt = tensorrt_double.module(rtx)
    trt.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(library, "_api", library._api.__wrapped__)
    path, _ = engines.exported("hf_vit", mode, torch.float16, tmp_path)
    report = build_engine(path, tmp_path / "m.engine", flavour="tensorrt", shapes={"batch": (1, 4, 8)}, progress=False)
    assert ("was put on q: TensorRT 10.3.0 has a known fault" in "".join(report.notes)) == rewritten
    plan = json.loads((tmp_path / "m.engine").read_text())
    built = ir.from_proto(onnx.load_from_string(base64.b64decode(plan["model"])))
    assert bool(split_scales(built)) != rewritten
    assert split_scales(ir.load(path))  # the file is the user's
