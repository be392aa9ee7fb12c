"""Decoders in onnxruntime-genai, which generates from our files as they are: make test-runtimes."""

import copy

import pytest
import torch
from genai_runs import SHAPES, configured, generated
from generating import CONFIGS, base_in, call, greedy

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter, export_onnx
from onelora_compile.testing import fill_vectors, merged_copy

pytest.importorskip("onnxruntime_genai")
pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of its builder


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_folded_decoder_generates_what_eager_does(kind, tmp_path):
    base = base_in(tmp_path / "base", kind)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.05)
    ends = configured(tmp_path / "base", tmp_path / "model")
    export_onnx(model, (), tmp_path / "model" / "model.onnx", call(model), dynamic_shapes=SHAPES)
    expected = greedy(merged_copy(model, torch.float64), ends)
    assert expected != greedy(base.double(), ends)
    assert generated(tmp_path / "model") == [expected]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_adapters_are_swapped_beside_one_model(kind, tmp_path):
    base = base_in(tmp_path / "base", kind)
    ends = configured(tmp_path / "base", tmp_path / "model")
    path = tmp_path / "model" / "model.onnx"
    expected = []
    for seed, name in enumerate(["a", "b", "none"], 1):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.0 if name == "none" else 0.02, seed)
        onelora.save_adapter(model, tmp_path / f"{name}.safetensors")
        if name == "a":
            export_onnx(model, (), path, call(model), adapters="input", dynamic_shapes=SHAPES)
        convert_adapter(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.onnx_adapter", like=path)
        expected.append(greedy(merged_copy(model, torch.float64), ends))
    assert expected[2] == greedy(base.double(), ends)
    assert len({tuple(one) for one in expected}) == 3
    assert generated(tmp_path / "model", [tmp_path / f"{name}.onnx_adapter" for name in ("a", "b", "none")]) == expected
