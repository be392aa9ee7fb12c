"""The configuration of onnxruntime-genai beside a model, and what it generates from the two."""

import json
import subprocess
import sys

import numpy as np
import pytest
from generating import PROMPT, TOKENS

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
