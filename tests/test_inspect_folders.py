"""`onelora inspect` of folders: those that the product writes, and others."""

import json
import re

import bundles
import pytest
import torch
import zoo
from command_line import run

import onelora_compile as onelora
from onelora_compile.errors import OneLoRAError
from onelora_compile.testing import fill_vectors


def shown_of(folder):
    """What is printed, on one line: a long path wraps titles."""
    return " ".join(run("inspect", folder).output.split())


def refused(folder):
    """The message of this package's error."""
    done = run("inspect", folder)
    assert isinstance(done.exception, OneLoRAError)
    return str(done.exception)


@pytest.mark.parametrize("mode", ["fold", "input", "bank"])
def test_a_bundle(mode, tmp_path):
    folder = bundles.fresh(mode, tmp_path)
    shown = json.loads(run("inspect", folder, "--json").output)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert shown["mode"] == mode
    assert shown["adapters"] == [one["name"] for one in manifest["adapters"]]
    assert shown["in_use"] == manifest["default"]
    assert shown["device"]["jetpack"] == manifest["device"]["jetpack"]
    assert shown["source_sha256"] == manifest["model"]["source_sha256"]
    assert shown["damaged"] == shown["engines"] == []
    text = shown_of(folder)
    assert "bundle for a Jetson" in text
    assert "all as they were packed" in text
    (folder / "model.onnx").unlink()
    assert "model.onnx: missing" in shown_of(folder)


def test_a_bundle_with_a_damaged_manifest(tmp_path):
    folder = bundles.fresh("fold", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for text in ("{", json.dumps({**manifest, "model": 3}), json.dumps({**manifest, "format_version": 99})):
        (folder / "manifest.json").write_text(text)
        assert re.search("manifest|format version", refused(folder))


def test_folders_with_an_adapter(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    onelora.save_adapter(model, tmp_path / "peft", format="peft")
    (tmp_path / "own").mkdir()
    onelora.save_adapter(model, tmp_path / "own" / "onelora.safetensors")
    for name in ("peft", "own"):
        assert "1LoRA adapter" in shown_of(tmp_path / name)


@pytest.mark.parametrize("held", [["m.onnx", "genai_config.json"], ["a.safetensors", "b.safetensors"], ["m.engine"]])
def test_another_folder_names_what_can_be_inspected(held, tmp_path):
    for name in held:
        (tmp_path / name).write_bytes(b"")
    text = refused(tmp_path)
    for name in held:
        assert (f"{tmp_path}/{name}" in text) == (not name.endswith(".json"))


def test_a_folder_of_folders_names_those_with_adapters(tmp_path):
    torch.manual_seed(0)
    onelora.save_adapter(fill_vectors(onelora.adapt(zoo.MLP())), tmp_path / "one", format="peft")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path).endswith(f"inspect one of {tmp_path}/one")
    assert refused(tmp_path / "empty").endswith("holds nothing that can be inspected")
