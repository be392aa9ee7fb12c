"""Decoders with a cache: its tensors are inputs and outputs of the file, for any length of the past."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, export_onnx, verify
from onelora_compile.testing import fill_vectors

SHAPES = {
    "input_ids": {0: "batch", 1: "tokens"},
    "attention_mask": {0: "batch", 1: "total"},
    "past_key_values": {0: "batch", 2: "past"},
}


def llama():
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, bos_token_id=0, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval()


def gpt2():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def call(model, batch, past, new):
    """Arguments of a step after a past that the model computed."""
    with torch.no_grad():
        cache = model(input_ids=torch.randint(0, 50, (batch, past)), use_cache=True).past_key_values
    mask = torch.ones(batch, past + new, dtype=torch.long)
    return {"input_ids": torch.randint(0, 50, (batch, new)), "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize(("build", "mode"), [(llama, "fold"), (gpt2, "input")])
def test_a_dynamic_cache_is_input_and_output(build, mode, tmp_path):
    model = fill_vectors(onelora.adapt(build()), 0.2)
    step = call(model, 2, 5, 3)
    layers = step["past_key_values"].layers
    before = [one.clone() for layer in layers for one in (layer.keys, layer.values)]
    export_onnx(model, (), tmp_path / "m.onnx", step, adapters=mode, dynamic_shapes=SHAPES, progress=False)
    after = [one for layer in layers for one in (layer.keys, layer.values)]
    assert all(map(torch.equal, before, after))
    assert step["past_key_values"].get_seq_length() == 5

    runner = OnnxRunner(tmp_path / "m.onnx")
    parts = [f"{index}.{part}" for index in range(2) for part in ("key", "value")]
    assert runner.input_names == ["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)]
    assert runner.output_names == ["logits", *(f"present.{part}" for part in parts)]
    for sizes in ((2, 5, 3), (3, 9, 2), (1, 1, 5), (2, 7, 1)):
        assert verify(runner, model, (), call(model, *sizes)).passed
