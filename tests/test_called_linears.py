"""A linear that is only called is adapted by its call: no sum of the size of its weight, and its input is not kept."""

from typing import Any

import pytest
import transformers
from architectures import ARCHITECTURES

import onelora_compile as onelora
from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.kinds import is_linear

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# With a cache, which their forwards make and hand on.
CACHED = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=64)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, intermediate_size=64)),
}
# Their code reads weights of linears.
READ = {
    "mamba": "dt_proj",
    "siglip": "out_proj",
    "encoder_post_norm": "out_proj",
    "encoder_pre_norm": "out_proj",
    "transformer": "out_proj",
    "cross_attention": "out_proj",
    "fused_bias_vit": "qkv",
}


def read_linears(model):
    return [
        name for name, one in adapted_weights(onelora.adapt(model)).items() if is_linear(one.module) and not one.called
    ]


@pytest.mark.parametrize("name", CACHED)
def test_with_a_cache(name):
    assert read_linears(CACHED[name]()) == []


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[] if one in ("opt", "gemma2", "mamba") else pytest.mark.slow) for one in ARCHITECTURES],
)
def test_every_architecture(name):
    found = read_linears(ARCHITECTURES[name]()[0])
    assert {one.rpartition(".")[2] for one in found} == {READ[name]} if name in READ else found == []
