"""Files converted to PEFT's folders and back, and PEFT's adapters where no base is at hand."""

import copy
import json

import peft
import peft_folders
import pytest
import torch
import zoo
from peft_folders import adapted, assert_same, output
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import onelora_compile as onelora
from onelora_compile.cli import main
from onelora_compile.exporters import convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors


def test_the_name_of_the_base_travels(tmp_path):
    base, _ = zoo.llama()
    base.config._name_or_path = "somebody/tiny-llama"
    model = fill_vectors(onelora.adapt(base))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["task_type"]) == ("somebody/tiny-llama", "CAUSAL_LM")
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (1, 1, False)


def test_converting_there_and_back_keeps_every_bit_and_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, model, inputs = adapted("tiny_vit", modules_to_save=["head"])
    onelora.save_adapter(model, "a.safetensors")
    for way in ("peft", "peft-miss"):
        convert_adapter("a.safetensors", way, format=way)
        convert_adapter(way, f"{way}.safetensors")
        back = onelora.load_adapter(copy.deepcopy(base), f"{way}.safetensors")
        assert torch.equal(output(back, inputs), output(model, inputs))
    export_onnx(base, (), "base.onnx", kwargs=inputs)
    fold_onnx("base.onnx", "peft-miss", "folded.onnx")  # by fingerprint: the folder has them


def test_the_base_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, inputs = zoo.tiny_vit()
    peft_folders.written(copy.deepcopy(base), "a", peft.MissConfig(r=1, target_modules=["fc1", "fc2"]))
    convert_adapter("a", "a.safetensors")
    assert onelora.read_adapter("a.safetensors").fingerprints == {}
    export_onnx(base, (), "base.onnx", kwargs=inputs)
    for source in ("a", "a.safetensors"):
        with pytest.raises(onelora.AdapterFileError, match=r"no fingerprints .*load_adapter\(model, path\)"):
            fold_onnx("base.onnx", source, "folded.onnx")
        with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
            model = onelora.load_adapter(copy.deepcopy(base), source)
    onelora.save_adapter(model, "b.safetensors")
    fold_onnx("base.onnx", "b.safetensors", "folded.onnx")
    with pytest.raises(onelora.ConfigError, match="size of the input is not known"):
        convert_adapter("a", "lora", format="peft")


def test_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    base, model, _ = adapted("tiny_vit")
    onelora.save_adapter(model, "a.safetensors")

    def run(*words, code=None):
        with pytest.raises(SystemExit) as left:
            main(words)
        said = capfd.readouterr()
        assert left.value.code == code, said.err
        return said

    run("convert", "a.safetensors", "-o", "folder/")
    run("convert", "a.safetensors", "-o", "my.folder", "--to", "peft-miss")
    assert "1LoRA adapter" in run("inspect", "my.folder").out
    run("convert", "folder", "-o", "b.safetensors")
    peft_folders.written(base, "lora", peft.LoraConfig(r=2, target_modules=["fc1"]))
    assert "(onelora convert --approximate)" in run("convert", "lora", "-o", "c.safetensors", code=1).err
    found = json.loads(run("convert", "lora", "-o", "c.safetensors", "--approximate", "--json").out)
    assert 0 < found["projection"]["total"] < 1
    assert found["knows_base"] is False
    assert "a vector keeps" in run("convert", "lora", "-o", "c.safetensors", "--approximate").out
    assert "1LoRA adapter" in run("inspect", "c.safetensors").out
    assert "there is no file or folder gone" in run("convert", "gone", "-o", "b", code=1).err
    assert "a folder" in run("convert", "a.safetensors", "-o", "a.bin", code=1).err


@pytest.mark.parametrize("way", ["peft", "peft-miss"])
def test_a_head_that_peft_trained_stays_through_folders_and_files(way, tmp_path, monkeypatch):
    """Nobody knows from which values it began, as PEFT keeps no fingerprints."""
    monkeypatch.chdir(tmp_path)
    base, inputs = zoo.tiny_vit()
    config = peft.LoraConfig if way == "peft" else peft.MissConfig
    peft_folders.written(copy.deepcopy(base), "a", config(r=1, target_modules=["fc1"], modules_to_save=["head"]))
    if way == "peft":
        peft_folders.edit_tensors("a", lambda held: [one.fill_(1) for name, one in held.items() if "lora_A" in name])
    theirs = peft_folders.loaded(copy.deepcopy(base), "a")
    convert_adapter("a", "b", format=way)
    convert_adapter("b", "c.safetensors")
    convert_adapter("c.safetensors", "d", format=way)
    onelora.combine({"d": 1.0}, "e.safetensors", trained="from:d")
    convert_adapter("e.safetensors", "e", format=way)
    for place in ("b", "c.safetensors", "d", "e.safetensors", "e"):
        assert set(onelora.read_adapter(place).saved) == {"head.weight", "head.bias"}
        with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
            ours = onelora.load_adapter(copy.deepcopy(base), place)
        assert_same(ours, theirs, inputs)


def test_what_another_tool_adds_to_a_folder_is_read(tmp_path):
    base, model, _ = adapted("tiny_vit", target_modules=["fc1"])
    onelora.save_adapter(model, tmp_path, format="peft")
    path = tmp_path / peft_folders.TENSORS
    with safe_open(path, framework="pt") as held:
        metadata = held.metadata()
    head = {f"base_model.model.head.{name}": torch.randn_like(one) for name, one in base.head.named_parameters()}
    save_file(load_file(path) | head, path, metadata)
    peft_folders.edit_config(tmp_path, modules_to_save=["head"])
    model = onelora.load_adapter(base, tmp_path)
    for name, value in head.items():
        assert torch.equal(model.get_parameter(name.removeprefix("base_model.model.")), value)
