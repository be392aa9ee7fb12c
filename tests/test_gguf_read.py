"""Adapters of llama.cpp as vectors: round trips, and files as others might write them."""

import copy
import json
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from command_line import run

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.gguf_layout import ARCHITECTURES

KINDS = {**gguf_files.OTHERS, **gguf_files.CONFIGS}
NAMES = {"gemma3_text": "gemma3"}  # of transformers, and of the table above
pytestmark = pytest.mark.filterwarnings("ignore:.*could not be checked:onelora_compile.OneLoRAWarning")


def adapted(kind, **config):
    model = gguf_files.model_of(kind)
    base = copy.deepcopy(model)
    return base, fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(**config)))


def assert_same(found, model):
    expected = onelora.vectors(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_every_kind_of_model_comes_back_bit_for_bit(kind, tmp_path):
    base, model = adapted(NAMES.get(kind, kind))
    assert base.config.model_type == kind
    base.config.save_pretrained(tmp_path)
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    assert_same(onelora.read_adapter(tmp_path / "a.gguf", base=tmp_path).vectors, model)
    assert_same(onelora.vectors(onelora.load_adapter(base, tmp_path / "a.gguf")), model)


@pytest.mark.parametrize("given", ["folder", "config.json", "base.gguf"])
def test_convert_gives_an_adapter_that_goes_back(given, tmp_path):
    base, model = adapted("llama", target_modules=["q_proj", "k_proj", "down_proj", "lm_head"])
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path)
    gguf_files.write_base(base, tmp_path / "base.gguf")
    option = ["--base", tmp_path if given == "folder" else tmp_path / given]
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    done = run("convert", tmp_path / "a.gguf", "-o", tmp_path / "a.safetensors", *option)
    assert done.exit_code == 0, done.output
    assert_same(onelora.read_adapter(tmp_path / "a.safetensors").vectors, model)
    assert_same(onelora.vectors(onelora.load_adapter(base, tmp_path / "a.safetensors")), model)
    for source, out in (("a.safetensors", "b.gguf"), ("a.gguf", "c.gguf")):
        convert_adapter(tmp_path / source, tmp_path / out, base=option[1])
        first, again = (gguf_files.tensors(tmp_path / name) for name in ("a.gguf", out))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_adapter_of_a_conv1d_becomes_a_folder_of_peft(tmp_path):
    _, model = adapted("gpt2")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    convert_adapter(tmp_path / "a.gguf", tmp_path / "peft", format="peft")  # its architecture tells enough
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert_same(onelora.read_adapter(tmp_path / "peft").vectors, model)


def factors(rows=64, inputs=64, rank=1, name="blk.1.attn_q.weight"):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rank, 1, generator=generator).expand(rank, inputs)
    return {f"{name}.lora_a": a, f"{name}.lora_b": torch.randn(rows, rank, generator=generator)}


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(1, 16.0, 16.0), (4, 16.0, 4.0), (4, 0.0, 1.0), (4, None, 1.0)])
def test_alpha_and_rank_scale_as_in_llama_cpp(rank, alpha, scale, tmp_path):
    held = factors(rank=rank) | factors(96, 64, 2 * rank, "blk.0.ffn_up.weight")
    gguf_files.write_lora(tmp_path / "a.gguf", held, alpha)
    gguf_files.model_of("llama").config.save_pretrained(tmp_path)
    found = onelora.read_adapter(tmp_path / "a.gguf", base=tmp_path).vectors
    q, up = found["model.layers.1.self_attn.q_proj"], found["model.layers.0.mlp.up_proj"]
    for vector, name, by in ((q, "blk.1.attn_q", scale), (up, "blk.0.ffn_up", scale / 2 if alpha else scale)):
        a, b = (held[f"{name}.weight.lora_{one}"].double() for one in "ab")
        expected = by * (b @ a)[:, 0]
        stored = gguf_files.interleaved(vector.double(), 4) if vector is q else vector.double()
        torch.testing.assert_close(stored, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_factors_in_another_type_are_taken(kind, tmp_path):
    held = {name: torch.from_numpy(one.numpy().astype(kind)) for name, one in factors().items()}
    gguf_files.write_lora(tmp_path / "a.gguf", held, 2.0, "qwen2")
    (vector,) = onelora.read_adapter(tmp_path / "a.gguf").vectors.values()  # a Qwen 2 needs no base
    a, b = (one.double() for one in held.values())
    assert torch.equal(vector, (2 * b @ a)[:, 0].float())


def test_a_lora_that_is_more_is_refused_or_approximated(tmp_path):
    base = gguf_files.model_of("qwen2")
    held = factors() | {"blk.1.attn_q.weight.lora_a": torch.randn(1, 64) + 1}
    gguf_files.write_lora(tmp_path / "a.gguf", held, 1.0, "qwen2")
    with pytest.raises(onelora.AdapterFileError, match=r"lora_A is not constant: vectors keep .*%"):
        onelora.load_adapter(base, tmp_path / "a.gguf")
    with pytest.warns(onelora.OneLoRAWarning, match="was approximated"):
        onelora.load_adapter(base, tmp_path / "a.gguf", approximate=True)
    a, b = (one.double() for one in held.values())
    torch.testing.assert_close(*(one.double() for one in (*onelora.vectors(base).values(), (b @ a).mean(1))))
    done = run("convert", tmp_path / "a.gguf", "-o", tmp_path / "a.safetensors", "--approximate")
    assert done.exit_code == 0
    assert "% of ‖ΔW‖²" in done.output


REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "an embedding": (factors(name="token_embd.weight"), {}, r"token_embd\.weight\.lora_a.*no LoRA of a linear"),
    "a norm": (factors() | {"blk.0.attn_norm.weight": torch.ones(64)}, {}, r"blk\.0\.attn_norm\.weight.*would be lost"),
    "experts": (factors(name="blk.0.ffn_up_exps.weight"), {}, "ffn_up_exps.*no LoRA of a linear"),
    "a layer too many": (factors(name="blk.2.attn_q.weight"), {}, r"blk\.2\.attn_q.*of 2 layers"),
    "a factor alone": ({"blk.0.ffn_up.weight.lora_a": torch.ones(1, 64)}, {}, "misses lora_B"),
    "other ranks": (factors() | {"blk.1.attn_q.weight.lora_a": torch.ones(2, 64)}, {}, "belong together"),
    "one axis": (factors() | {"blk.1.attn_q.weight.lora_a": torch.ones(64)}, {}, "a factor has two axes"),
    "NaN": (factors() | {"blk.1.attn_q.weight.lora_b": torch.full((64, 1), torch.nan)}, {}, "NaN or infinity"),
    "an infinite alpha": (factors(), {"alpha": torch.inf}, r"adapter\.lora\.alpha is inf"),
    "too large": (factors(), {"alpha": 3e38}, "NaN or infinity.*too large"),
    "nothing": ({}, {}, "holds no tensors of LORA"),
    "a control vector": (factors(), {"adapter.type": "control_vector"}, "'control_vector', and no LoRA"),
    "an activated LoRA": (factors(), {"adapter.alora.invocation_tokens": [1, 2]}, "an activated LoRA"),
    "another architecture": (factors(), {"architecture": "qwen2"}, "is for a qwen2; LlamaForCausalLM is a llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_vectors_is_refused_by_name(case, tmp_path):
    held, extra, said = REFUSED[case]
    gguf_files.write_lora(tmp_path / "a.gguf", held, **extra)
    base = gguf_files.model_of("llama")
    with pytest.raises(onelora.AdapterFileError, match=said):
        onelora.load_adapter(base, tmp_path / "a.gguf")
    assert not onelora.vectors(base)


def test_a_model_and_a_damaged_file_are_no_adapters(tmp_path):
    base, model = adapted("llama")
    gguf_files.write_base(base, tmp_path / "base.gguf")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("no GGUF")
    for name, said in {"base": "is a model, and no LoRA", "short": "is damaged", "text": "not a GGUF file"}.items():
        with pytest.raises(onelora.AdapterFileError, match=said):
            onelora.load_adapter(base, tmp_path / f"{name}.gguf")
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        onelora.load_adapter(base, tmp_path / "gone.gguf")


def test_rows_that_need_the_base_ask_for_it(tmp_path):
    gguf_files.write_lora(tmp_path / "a.gguf", factors())
    with pytest.raises(onelora.ConfigError, match="depends on the heads of its base, a llama: give that"):
        onelora.read_adapter(tmp_path / "a.gguf")
    gguf_files.write_lora(tmp_path / "b.gguf", factors(), architecture="mamba")
    with pytest.raises(onelora.ConfigError, match=r"of a 'mamba' is not known here\. Known are llama"):
        onelora.read_adapter(tmp_path / "b.gguf")


def test_loading_says_that_the_base_is_not_checked(tmp_path):
    base, model = adapted("qwen2")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        onelora.load_adapter(base, tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_inspect_needs_no_base(kind, tmp_path):
    _, model = adapted(kind)
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    done = run("inspect", tmp_path / "a.gguf", "--json")
    assert done.exit_code == 0, done.output
    shown = {name: one["shape"] for name, one in json.loads(done.output)["vectors"].items()}
    assert shown == {name: list(vector.shape) for name, vector in onelora.vectors(model).items()}


@pytest.mark.parametrize("given", ["folder", "config.json", "base.gguf"])
def test_a_sum_with_an_adapter_of_a_llama(given, tmp_path):
    base, model = adapted("llama", target_modules=["q_proj", "k_proj", "down_proj"])
    base.save_pretrained(tmp_path)
    gguf_files.write_base(base, tmp_path / "base.gguf")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    a = {name: vector.detach().double() for name, vector in onelora.vectors(model).items()}
    onelora.save_adapter(fill_vectors(model, seed=7), tmp_path / "b.safetensors")
    files = [tmp_path / "a.gguf", tmp_path / "b.safetensors"]
    option = ["--base", tmp_path if given == "folder" else tmp_path / given]
    done = run("combine", f"{files[0]}:0.5", f"{files[1]}:-2", "-o", tmp_path / "mix.safetensors", *option)
    assert done.exit_code == 0, done.output
    found = onelora.read_adapter(tmp_path / "mix.safetensors").vectors
    assert found.keys() == a.keys()
    for name, b in onelora.vectors(model).items():
        assert not torch.equal(a[name], b.double())
        assert torch.equal(found[name], (0.5 * a[name] - 2 * b.detach().double()).float())


def test_where_the_base_is_needed_says_how_to_give_it(tmp_path):
    base, model = adapted("llama")
    base.config.save_pretrained(tmp_path)
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    onelora.save_adapter(model, tmp_path / "b.safetensors")
    given, message = {tmp_path / "a.gguf": 1.0}, r"depends on the heads of its base.*combine.*--base"
    with pytest.raises(onelora.ConfigError, match=message):
        onelora.combine(given)
    assert set(onelora.combine(given, base=tmp_path).vectors) == set(onelora.vectors(model))
    with pytest.raises(onelora.ConfigError, match=r"base= is for an adapter \.gguf, or for trained='add'"):
        onelora.combine({tmp_path / "b.safetensors": 1.0}, base=tmp_path)
    with pytest.raises(onelora.ConfigError, match="would overwrite the input"):
        onelora.combine(given, tmp_path / "config.json", base=tmp_path / "config.json")
