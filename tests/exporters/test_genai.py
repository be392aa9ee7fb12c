"""Decoders in onnxruntime-genai, which generates from our files as they are: make test-runtimes."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter, export_onnx
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms

pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of its builder
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
}
SHAPES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "past + sequence"},
    "past_key_values": {0: "batch", 2: "past"},
}
PROMPT, TOKENS = [5, 17, 33, 40], 8


def base_in(folder, kind):
    """A base and its tokenizer, saved as transformers does."""
    torch.manual_seed(0)
    config = CONFIGS[kind](
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = perturb_norms(transformers.AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # tokens of a random model lie close together
    base.save_pretrained(folder)
    words = tokenizers.models.WordLevel(
        {f"t{number}": number for number in range(60)}, unk_token="t0"
    )  # Qwen adds its own
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="t0")
    tokenizer.save_pretrained(folder)
    return base


def configured(base, folder):
    """Give the folder of a model the configuration that genai's own builder writes of a base; its end tokens."""
    options = ["-p", "fp32", "-e", "cpu", "-c", folder / "cache", "--extra_options", "config_only=true"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", base, "-o", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def call(model):
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 64, (2, 3)), past_key_values=cache)
    mask = torch.ones(2, 5, dtype=torch.long)
    return {"input_ids": torch.randint(3, 64, (2, 2)), "past_key_values": cache, "attention_mask": mask}


@torch.no_grad()
def greedy(model, ends):
    """Without the end tokens, which genai does not take either before `min_length`."""
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[ends] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


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
