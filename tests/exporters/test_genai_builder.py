"""Adapters folded into what onnxruntime-genai's own builder writes of decoders: make test-runtimes.

It packs query, key and value into one weight and names its nodes in its own way.
"""

import copy

import pytest
import torch
from genai_runs import built, generated
from generating import CONFIGS, base_in, greedy

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy

pytest.importorskip("onnxruntime_genai")
pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of its builder

# Its attention needs room for the whole window, so a real Gemma 2 a max_length of 4096.
CHANGES = {"gemma2": {"sliding_window": 8}}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_an_adapter_is_folded_into_what_the_builder_writes(kind, tmp_path):
    base = base_in(tmp_path / "base", kind, **CHANGES.get(kind, {}))
    ends = built(tmp_path / "base", tmp_path / "model")
    before = greedy(copy.deepcopy(base).double(), ends)
    assert generated(tmp_path / "model") == [before]
    model = fill_vectors(onelora.adapt(base), 0.02, 1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    path = tmp_path / "model" / "model.onnx"
    report = fold_onnx(path, tmp_path / "a.safetensors", path)
    assert set(report.folded) == set(onelora.vectors(model))
    expected = greedy(merged_copy(model, torch.float64), ends)
    assert expected != before
    assert generated(tmp_path / "model") == [expected]
