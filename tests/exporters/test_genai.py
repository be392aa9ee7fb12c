"""Decoders in onnxruntime-genai, which generates from our files as they are: make test-runtimes."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from generating import CONFIGS, PROMPT, TOKENS, base_in, call, greedy

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter, export_onnx
from onelora_compile.testing import fill_vectors, merged_copy

pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of its builder
SHAPES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "past + sequence"},
    "past_key_values": {0: "batch", 2: "past"},
}


def configured(base, folder):
    """Give the folder of a model the configuration that genai's own builder writes of a base; its end tokens."""
    options = ["-p", "fp32", "-e", "cpu", "-c", folder / "cache", "--extra_options", "config_only=true"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", base, "-o", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def generated(folder, adapters=()):
    """What genai generates with each adapter in turn, of one model that is loaded once."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    held = genai.Adapters(model) if adapters else None
    answers = []
    for adapter in adapters or [None]:
        params = genai.GeneratorParams(model)
        length = len(PROMPT) + TOKENS
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        if held is not None:
            held.load(str(adapter), adapter.name)
            generator.set_active_adapter(held, adapter.name)
        generator.append_tokens(np.array([PROMPT], np.int32))
        for _ in range(TOKENS):
            generator.generate_next_token()
        answers.append([int(token) for token in generator.get_sequence(0)][len(PROMPT) :])
    return answers


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_folded_decoder_generates_what_eager_does(kind, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    base = base_in(tmp_path / "base", kind)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.05)
    ends = configured(tmp_path / "base", tmp_path / "model")
    export_onnx(model, (), tmp_path / "model" / "model.onnx", call(model), dynamic_shapes=SHAPES)
    expected = greedy(merged_copy(model, torch.float64), ends)
    assert expected != greedy(base.double(), ends)
    assert generated(tmp_path / "model") == [expected]


def test_adapters_are_swapped_beside_one_model(tmp_path):
    pytest.importorskip("onnxruntime_genai")
    base = base_in(tmp_path / "base", "llama")
    ends = configured(tmp_path / "base", tmp_path / "model")
    path = tmp_path / "model" / "model.onnx"
    expected = []
    for seed, name in enumerate(["a", "b", "none"]):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.0 if name == "none" else 0.05, seed)
        onelora.save_adapter(model, tmp_path / f"{name}.safetensors")
        if name == "a":
            export_onnx(model, (), path, call(model), adapters="input", dynamic_shapes=SHAPES)
        convert_adapter(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.onnx_adapter", like=path)
        expected.append(greedy(merged_copy(model, torch.float64), ends))
    assert expected[2] == greedy(base.double(), ends)
    assert len({tuple(one) for one in expected}) == 3
    assert generated(tmp_path / "model", [tmp_path / f"{name}.onnx_adapter" for name in ("a", "b", "none")]) == expected
