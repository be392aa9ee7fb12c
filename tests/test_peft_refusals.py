"""What vectors can't hold of PEFT, and folders that are damaged: named, and the model stays as it was."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import peft
import peft_folders
import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.base_values import base_values


@pytest.fixture
def folder(tmp_path):
    return peft_folders.ours(tmp_path / "a")


def refused(folder, message):
    """Neither reading nor loading takes it, and the model stays as it was."""
    model, inputs = zoo.tiny_vit()
    before = model(**inputs)
    for call in (lambda: onelora.read_adapter(folder), lambda: onelora.load_adapter(model, folder)):
        with pytest.raises(onelora.AdapterFileError, match=message):
            call()
    assert torch.equal(model(**inputs), before)
    assert not onelora.vectors(model)


OTHERS = {
    "dora": (peft.LoraConfig(r=1, use_dora=True, target_modules=["fc1"]), "use_dora: DoRA"),
    "bias": (peft.LoraConfig(r=1, bias="all", target_modules=["fc1"]), "bias='all': biases of the base were trained"),
    "lora_bias": (peft.LoraConfig(r=1, lora_bias=True, target_modules=["fc1"]), "lora_bias: a bias"),
    "pissa": (peft.LoraConfig(r=1, init_lora_weights="pissa", target_modules=["fc1"]), "the base was changed"),
    "loha": (peft.LoHaConfig(r=1, target_modules=["fc1"]), "a LOHA adapter is not one vector"),
    "ia3": (peft.IA3Config(target_modules=["fc1"], feedforward_modules=[]), "a IA3 adapter is not one vector"),
    "miss 2": (peft.MissConfig(r=2, target_modules=["fc1"]), "MISS of r=2: 2 vectors for each layer"),
    "bat": (peft.MissConfig(r=1, init_weights="bat", target_modules=["fc1"]), "init_weights='bat'"),
    "lora 4": (peft.LoraConfig(r=4, target_modules=["fc1"]), r"rank 4 .* keep \d+\.\d% of .*would be lost"),
    "mini": (peft.MissConfig(r=1, init_weights="mini", mini_r=2, target_modules=["fc1"]), "init_weights='mini'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_maps_of_peft_are_named(case, tmp_path):
    config, message = OTHERS[case]
    peft_folders.written(zoo.tiny_vit()[0], tmp_path / "a", copy.deepcopy(config))
    refused(tmp_path / "a", message)


def test_a_lora_that_is_nearly_one_vector_is_not_called_all_of_it(folder):
    peft_folders.edit_tensors(folder, lambda tensors: tensors[KEY.format("A")][0, 0].add_(0.01))
    refused(folder, r"vectors keep >99\.9% of ‖ΔW‖² in all, >99\.9% to 100\.0% per layer.*would be lost")


def test_attention_of_torch_and_embeddings_as_peft_adapts_them_are_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.attn = nn.Embedding(7, 8), nn.MultiheadAttention(8, 2)

    peft_folders.written(Net(), tmp_path / "attn", peft.LoraConfig(r=1, target_modules=["attn"]))
    peft_folders.written(Net(), tmp_path / "words", peft.LoraConfig(r=1, target_modules=["words"]))
    refused(tmp_path / "attn", "inside of an adapted module")
    refused(tmp_path / "words", "holds no tensors of LORA; it has .*lora_embedding")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"use_magic": True}, "use_magic.*does not know"),
    "rank": ({"r": 3}, "of rank 1; the configuration says 3"),
    "rank pattern": ({"rank_pattern": {"fc1": 2}}, "'blocks.0.fc1' is of rank 1; the configuration says 2"),
    "r of no number": ({"r": "one"}, "damaged: r is 'one'"),
    "no alpha": ({"lora_alpha": None}, "damaged: lora_alpha is None, and has to be a finite number"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "damaged: lora_alpha is nan, and has to be a finite number"),
    "no rank": ({"r": 0}, "damaged: r is 0, and has to be a whole number from 1"),
    "a hostile pattern": ({"alpha_pattern": {"(a+)+$": 2}}, "more than one repetition"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, "no regular expression"),
    "patterns of no dict": ({"rank_pattern": [1]}, "rank_pattern is "),
    "no names": ({"target_modules": [1]}, "damaged: target_modules"),
    "no type": ({"peft_type": None}, "names no peft_type"),
    "a head that is not there": ({"modules_to_save": ["head"]}, r"misses the tensors of modules_to_save: head"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_say_something_else(case, folder):
    changes, message = CONFIGS[case]
    peft_folders.edit_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100000], ids=range(6))
def test_a_configuration_that_is_no_json(text, folder):
    (folder / peft_folders.CONFIG).write_text(text, encoding="latin-1")
    refused(folder, "adapter_config.json")


def test_a_configuration_that_an_editor_gave_a_byte_order_mark(folder):
    path = folder / peft_folders.CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert onelora.read_adapter(folder).vectors


def test_the_configuration_of_a_folder_is_given_for_it(folder):
    with pytest.raises(onelora.AdapterFileError, match=f"configuration .*: give its folder, {folder}"):
        onelora.read_adapter(folder / peft_folders.CONFIG)


def test_a_linear_with_a_vector_that_is_trained_as_a_whole_too(folder):
    """As no program writes it."""
    heads = {f"base_model.model.head.{name}": one for name, one in zoo.tiny_vit()[0].head.named_parameters()}
    peft_folders.edit_tensors(folder, lambda tensors: tensors.update(heads))
    peft_folders.edit_config(folder, modules_to_save=["head"])
    model, _ = zoo.tiny_vit()
    with pytest.raises(onelora.AdapterFileError, match="has vectors for head, which its modules_to_save train"):
        onelora.load_adapter(model, folder)
    assert not onelora.vectors(model)


KEY = "base_model.model.blocks.0.fc1.lora_{}.weight"
TENSORS = {
    "missing B": (lambda t: t.pop(KEY.format("B")), "'blocks.0.fc1' has lora_A, and misses lora_B"),
    "missing A": (lambda t: t.pop(KEY.format("A")), "'blocks.0.fc1' has lora_B, and misses lora_A"),
    "shapes": (lambda t: t.update({KEY.format("A"): torch.ones(2, 48)}), "lora_A of 'blocks.0.fc1' is .2, 48."),
    "empty": (lambda t: t.update({KEY.format("A"): torch.ones(0, 48)}), "lora_A of 'blocks.0.fc1' is .0, 48."),
    "vector": (lambda t: t.update({KEY.format("A"): torch.ones(48)}), "lora_A of 'blocks.0.fc1' is .48."),
    "nan": (lambda t: t[KEY.format("B")].fill_(float("nan")), "NaN or infinity in .*lora_B"),
    "overflow": (lambda t: [t[KEY.format(one)].fill_(1e30) for one in "AB"], "too large for float32"),
    "strange": (lambda t: t.update({"base_model.model.head.bias": torch.ones(5)}), "head.bias, which is neither"),
    "magnitude": (
        lambda t: t.update({"base_model.model.head.lora_magnitude_vector": torch.ones(5)}),
        "lora_magnitude_vector, which is neither",
    ),
    "two": (
        lambda t: t.update({KEY.format("A").replace("weight", f"{n}.weight"): torch.ones(1, 48) for n in "ab"}),
        "several adapters .a, b.",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_belong_together(case, folder):
    change, message = TENSORS[case]
    peft_folders.edit_tensors(folder, change)
    refused(folder, message)


def test_names_of_adapters_compiled_models_and_no_prefix_are_understood(folder):
    expected = onelora.read_adapter(folder).vectors

    def rename(tensors):
        for key in list(tensors):
            name = key.removeprefix("base_model.model.").replace(".weight", ".my_adapter.weight")
            tensors[f"_orig_mod.{name}"] = tensors.pop(key)

    peft_folders.edit_tensors(folder, rename)
    found = onelora.read_adapter(folder).vectors
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_pickles_are_not_opened_and_sharded_or_foreign_folders_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = folder / peft_folders.TENSORS
    kept = tensors.read_bytes()
    tensors.unlink()
    refused(folder, "has no adapter_model.safetensors; it holds adapter_config.json")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(folder, "as a pickle .*is not opened")
    tensors.write_bytes(pickle.dumps(Trap()))  # under the name of the other format
    refused(folder, "not a safetensors file but a pickle, .*not opened")
    torch.save({"weight": torch.ones(3)}, tensors)
    refused(folder, "not a safetensors file but a zip file, as torch.save writes")
    assert not Path("opened").exists()
    tensors.unlink()
    for name in ("adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"):
        (folder / name).write_bytes(kept)
    refused(folder, "split over several files")
    refused(tmp_path, r"no adapter of PEFT: it has no adapter_config.json; .*a is one")


MISTAKEN = {
    "pickle": (pickle.dumps(Trap()), "but a pickle"),
    "git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "but a pointer of git LFS"),
    "page": (b"<!doctype html><html>", "but a page of HTML"),
    "GGUF": (b"GGUF" + bytes(40), "but a GGUF file"),
    "damaged": (b"\x80\x02" + bytes(6) + b"{}", "or is damaged"),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_what_lies_under_a_name_of_safetensors_is_named(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = MISTAKEN[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(path, message)
    with pytest.raises(onelora.ConfigError, match=f"base: .*{message}"):
        base_values(path)
    assert not Path("opened").exists()


def test_another_base_is_refused_by_fingerprint_or_by_shape(folder, tmp_path):
    base, _ = zoo.tiny_vit()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    onelora.save_adapter(model, tmp_path / "known", format="peft")
    with torch.no_grad():
        base.blocks[0].fc1.weight.mul_(2)
    with pytest.raises(onelora.BaseMismatchError, match=r"blocks\.0\.fc1 \(differs"):
        onelora.load_adapter(base, tmp_path / "known")
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        onelora.load_adapter(base, folder)
    with pytest.raises(
        onelora.AdapterFileError, match=r"'embed' is for a weight of \[48, 12\]; the model's is \[60, 12\]"
    ):
        onelora.load_adapter(zoo.TinyViT(width=60), folder)
    with pytest.raises(onelora.AdapterFileError, match="vectors for linears that Sequential does not have"):
        onelora.load_adapter(nn.Sequential(nn.Linear(3, 3)), folder)


def test_a_layer_that_the_configuration_selects_and_the_tensors_lack(folder):
    peft_folders.edit_tensors(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if "blocks.1.fc2" in k])
    with pytest.raises(
        onelora.AdapterFileError, match=r"no tensors for blocks\.1\.fc2, which its target_modules select"
    ):
        onelora.load_adapter(zoo.tiny_vit()[0], folder)


def test_a_trained_head_that_is_tied_here(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.fc, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)

        def forward(self, ids):
            return self.head(self.fc(self.words(ids)))

    base = Tied()
    config = peft.MissConfig(r=1, target_modules=["fc"], modules_to_save=["head"])
    peft_folders.written(copy.deepcopy(base), tmp_path / "a", config)
    base.head.weight = base.words.weight
    with pytest.raises(onelora.AdapterFileError, match=r"head\.weight apart .*tied to other .*words\.weight"):
        onelora.load_adapter(base, tmp_path / "a")
    chosen = onelora.OneLoRAConfig(target_modules=["fc"], modules_to_save=["head"])
    with pytest.raises(onelora.ConfigError, match=r"head\.weight is tied .*PEFT would train a copy"):
        onelora.save_adapter(onelora.adapt(base, chosen), tmp_path / "b", format="peft")
    assert not (tmp_path / "b").exists()
