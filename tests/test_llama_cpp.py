"""Adapters in llama.cpp itself, and against its own converter: make test-servers."""

import copy
import ctypes
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import torch
import transformers

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy, perturb_norms

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("ignore")]
CONVERTER = Path(sys.prefix, "llama.cpp", "convert_lora_to_gguf.py")
CONFIGS = {
    **{kind: made for kind, made in gguf_files.CONFIGS.items() if kind != "gpt2"},  # the converter turns its factors
    **gguf_files.OTHERS,
}
IDS = [5, 17, 33, 60, 2, 9]


def logits(base, ids, adapter=None):
    """What llama.cpp computes in float32 on one thread, float32 [tokens, vocabulary]."""
    llama = pytest.importorskip("llama_cpp")
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(base).encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama.GGML_TYPE_F32
    params.flash_attn_type = 0
    context = llama.llama_init_from_model(model, params)
    assert context, base
    if adapter is not None:
        loaded = llama.llama_adapter_lora_init(model, str(adapter).encode())
        assert loaded, adapter
        adapters, scales = (llama.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(1.0)
        assert llama.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    rows = [llama.llama_get_logits_ith(context, place)[:64] for place in range(len(ids))]
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_llama_cpp_computes_what_the_merged_model_does(kind, tmp_path):
    base = perturb_norms(gguf_files.model_of(kind))
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.05)
    gguf_files.write_base(base, tmp_path / "base.gguf")
    gguf_files.write_base(merged_copy(model), tmp_path / "merged.gguf")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    with torch.no_grad():
        expected = merged_copy(model, torch.float64)(torch.tensor([IDS])).logits[0]
    adapted = logits(tmp_path / "base.gguf", IDS, tmp_path / "a.gguf")
    # Its own error, as of a model that was merged before it got there; of GPT-2 that is its table of GELU.
    assert_parity(adapted, expected, logits(tmp_path / "merged.gguf", IDS), floor=4)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_file_is_what_its_converter_makes_of_a_folder_of_peft(kind, tmp_path):
    cls, sizes = CONFIGS[kind]
    model = transformers.AutoModelForCausalLM.from_config(cls(**sizes))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    fill_vectors(onelora.adapt(model))
    onelora.save_adapter(model, tmp_path / "peft", format="peft")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    command = [sys.executable, CONVERTER, "--base", tmp_path, "--outfile", tmp_path / "b.gguf", tmp_path / "peft"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = gguf_files.tensors(tmp_path / "a.gguf"), gguf_files.tensors(tmp_path / "b.gguf")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    said, known = gguf_files.fields(tmp_path / "a.gguf"), gguf_files.fields(tmp_path / "b.gguf")
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert [said[key] for key in keys] == [known[key] for key in keys]
    again = onelora.load_adapter(transformers.AutoModelForCausalLM.from_config(cls(**sizes)), tmp_path / "b.gguf")
    assert torch.equal(*(torch.cat(list(onelora.vectors(one).values())) for one in (model, again)))


@pytest.mark.parametrize("alpha", [3.0, 0.0])
def test_a_scaled_lora_is_read_as_llama_cpp_applies_it(alpha, tmp_path):
    base = perturb_norms(gguf_files.model_of("llama"))
    gguf_files.write_base(base, tmp_path / "base.gguf")
    held = {name: one.shape for name, one in gguf_files.tensors(tmp_path / "base.gguf").items() if "blk" in name}
    factors = {}
    for name, shape in held.items():
        if len(shape) == 2:
            factors[f"{name}.lora_a"] = torch.tensor([[0.5], [-1.0]]).expand(2, shape[1])
            factors[f"{name}.lora_b"] = torch.randn(shape[0], 2) * 0.02
    gguf_files.write_lora(tmp_path / "a.gguf", factors, alpha)
    model = onelora.load_adapter(copy.deepcopy(base), tmp_path / "a.gguf")
    gguf_files.write_base(merged_copy(model), tmp_path / "merged.gguf")
    with torch.no_grad():
        expected = merged_copy(model, torch.float64)(torch.tensor([IDS])).logits[0]
    adapted = logits(tmp_path / "base.gguf", IDS, tmp_path / "a.gguf")
    assert_parity(adapted, expected, logits(tmp_path / "merged.gguf", IDS), floor=4)
