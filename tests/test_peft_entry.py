"""The entries for PEFT's method comparison are PEFT's own configurations and train what the page says."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ENTRIES = Path(__file__).parents[1] / "benchmarks" / "peft_method_comparison" / "experiments" / "miss"


@pytest.mark.parametrize(
    ("name", "numbers"), [("llama-3.2-3B-rank1", 114_688), ("llama-3.2-3B-rank1-all-linear", 774_144)]
)
def test_numbers_trained_on_llama_3b(name, numbers):
    sizes: Any = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128_256}
    heads: Any = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    config = peft.PeftConfig.from_pretrained(ENTRIES / name)
    assert type(config) is peft.MissConfig
    with torch.device("meta"):
        model = peft.inject_adapter_in_model(config, LlamaForCausalLM(LlamaConfig(**sizes, **heads)))
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == numbers
    assert f"{numbers:,}" in (ENTRIES.parents[1] / "README.md").read_text()


def test_parameters_of_the_training_are_in_their_format():
    for path in ENTRIES.glob("*/training_params.json"):
        assert json.loads(path.read_text()) == {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 0.0}}
    assert len(list(ENTRIES.glob("*/training_params.json"))) == len(list(ENTRIES.iterdir())) == 2
