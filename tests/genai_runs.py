"""Folders of onnxruntime-genai, as its own builder writes them, and what it generates from them."""

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


def built(base, folder, precision="fp32", **options):
    """Let genai's own builder write the folder of a model; its end tokens.

    Args:
        base: folder of the base.
        folder: that is written.
        precision: of the weights, "fp32" or "int4".
        options: more of the builder's.
    """
    more = ["-p", precision, "-e", "cpu", "-c", folder / "cache"]
    more += ["--extra_options", *(f"{name}={value}" for name, value in options.items())] if options else []
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", base, "-o", folder, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def configured(base, folder):
    """Give the folder of a model of ours the configuration that the builder writes of a base; its end tokens."""
    return built(base, folder, config_only="true")


def generated(folder, adapters=(), prompt=PROMPT):
    """What genai generates with each adapter in turn, of one model that is loaded once."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    held = genai.Adapters(model) if adapters else None
    answers = []
    for adapter in adapters or [None]:
        params = genai.GeneratorParams(model)
        length = len(prompt) + TOKENS
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        if held is not None:
            held.load(str(adapter), adapter.name)
            generator.set_active_adapter(held, adapter.name)
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(TOKENS):
            generator.generate_next_token()
        answers.append([int(token) for token in generator.get_sequence(0)][len(prompt) :])
    return answers
