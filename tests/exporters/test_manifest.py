"""An engine is loaded with its manifest, and only where that says it runs; no part of that needs a GPU."""

import dataclasses
import json
import shutil

import engines
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import EngineRunner, refit_engine
from onelora_compile.exporters.jetson.device.core.logger import Messages
from onelora_compile.exporters.tensorrt import manifest
from onelora_compile.exporters.tensorrt.library import Api, find_api
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.exporters.tensorrt.refit import vectors_for
from onelora_compile.testing import fill_vectors

pytest.importorskip("tensorrt_rtx_bindings")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return engines.build_modes(tmp_path_factory.mktemp("built"))


@pytest.fixture
def folder(built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(path, **fields):
    file = path.with_name(f"{path.name}.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_runner_says_so(folder):
    with pytest.raises(onelora.StateError, match=r"engines run on a GPU, .* none here \(PyTorch .*; .*CUDA"):
        EngineRunner(folder / "fold.engine")
    with pytest.raises(onelora.StateError, match=r"none here \(.*(libcudart|CUDA)"):
        EngineRunner(folder / "fold.engine", memory="cuda")
    with pytest.raises(onelora.ConfigError, match="memory='numpy' is not one of"):
        EngineRunner(folder / "fold.engine", memory="numpy")


def test_no_engine_without_its_manifest(folder):
    (folder / "fold.engine.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"fold\.engine\.json is missing: an engine travels with its manifest"):
        EngineRunner(folder / "fold.engine")
    with pytest.raises(FileNotFoundError, match="there is no engine"):
        EngineRunner(folder / "no.engine")


def test_another_engine_under_the_same_name(folder):
    shutil.copy(folder / "bank.engine", folder / "fold.engine")
    with pytest.raises(onelora.ExportError, match=r"is not the engine that fold\.engine\.json was written for"):
        EngineRunner(folder / "fold.engine")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"version": "1.4.0.76"},
            r"built by TensorRT-RTX 1\.4\.0\.76, here is TensorRT-RTX .*Build it again here from",
        ),
        ({"system": "Linux aarch64"}, r"it was built on Linux aarch64, here is"),
        ({"version": "9", "system": "Windows AMD64"}, r"here is TensorRT-RTX .*; it was built on Windows AMD64"),
    ],
)
def test_where_it_does_not_run(fields, match, folder):
    change(folder / "fold.engine", **fields)
    with pytest.raises(onelora.StateError, match=match):
        EngineRunner(folder / "fold.engine")


def test_the_other_product_is_not_installed(folder):
    change(folder / "fold.engine", flavour="tensorrt")
    with pytest.raises(onelora.MissingExtraError, match="tensorrt is not installed"):
        EngineRunner(folder / "fold.engine")


def test_another_device(folder):
    found = Manifest.read(folder / "fold.engine")
    found.check_device("sm_86", folder / "fold.engine")
    with pytest.raises(onelora.StateError, match=r"it was built for sm_86, this GPU is sm_120"):
        found.check_device("sm_120", folder / "fold.engine")
    dataclasses.replace(found, targets=()).check_device("sm_120", folder / "fold.engine")


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        '{"format": "other", "format_version": 1}',
        '{"format": "onelora-engine", "format_version": 1}',
        "\udcff",
        "[" * 100000,
    ],
)
def test_damaged_manifests(damage, folder):
    (folder / "fold.engine.json").write_text(damage, errors="surrogateescape")
    with pytest.raises(onelora.ExportError, match="is not a manifest of an engine, or is damaged"):
        Manifest.read(folder / "fold.engine")


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_every_field_is_read_or_missed(key, folder):
    file = folder / "input.engine.json"
    raw = json.loads(file.read_text())
    del raw[key]
    file.write_text(json.dumps(raw))
    with pytest.raises(onelora.ExportError, match=key):
        Manifest.read(folder / "input.engine")


def test_a_newer_format(folder):
    change(folder / "fold.engine", format_version=3)
    with pytest.raises(onelora.ExportError, match=r"format version 3; .* upgrade it"):
        Manifest.read(folder / "fold.engine")


def test_an_older_format_says_nothing_of_trained_tensors(folder):
    file = folder / "input.engine.json"
    raw = json.loads(file.read_text())
    for key in ("trained", "constant", "digests"):
        del raw[key]
    file.write_text(json.dumps({**raw, "format_version": 1}))
    found = Manifest.read(folder / "input.engine")
    assert (found.trained, found.constant, found.digests) == ({}, {}, ())
    assert found.vectors


def test_a_jetsons_release(tmp_path, monkeypatch):
    path = tmp_path / "nv_tegra_release"
    path.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    monkeypatch.setattr(manifest, "Path", lambda _: path)
    assert manifest.l4t_release() == "36.4.3"
    path.unlink()
    assert manifest.l4t_release() == ""


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        ("fold", r"can't be refitted \(mode 'fold'\): its vectors are in its weights: build it again"),
        ("input", r"its vectors are inputs, which need no refit: EngineRunner"),
        ("bank", r"chosen by the input adapter_ids"),
    ],
)
def test_engines_that_need_no_refit(mode, match, folder):
    with pytest.raises(onelora.StateError, match=match):
        refit_engine(folder / f"{mode}.engine", folder / "linear.safetensors")


def adapter(path, model, scale=0.3):
    onelora.save_adapter(fill_vectors(onelora.adapt(model), scale, seed=9), path)
    return path


def test_refit_checks_everything_before_the_gpu(folder):
    """The manifest of a refittable engine: its plan can't be built here, so another one stands in its place."""
    change(folder / "input.engine", mode="refit")
    torch.manual_seed(0)
    mine = adapter(folder / "mine.safetensors", nn.Sequential(nn.Linear(64, 48)))
    torch.manual_seed(1)
    foreign = adapter(folder / "foreign.safetensors", nn.Sequential(nn.Linear(64, 48)))
    found = Manifest.read(folder / "input.engine")
    _, values = vectors_for(found, folder / "input.engine", mine)
    assert torch.equal(torch.from_numpy(values["0"]), onelora.read_adapter(mine).vectors["0"])  # absolute, no delta
    with pytest.raises(onelora.BaseMismatchError):
        refit_engine(folder / "input.engine", foreign)
    before = (folder / "input.engine").read_bytes()
    if not torch.cuda.is_available():
        with pytest.raises(onelora.ExportError, match=r"can't be loaded: TensorRT-RTX .* says: .*There is no GPU"):
            refit_engine(folder / "input.engine", mine)
    assert (folder / "input.engine").read_bytes() == before


def test_messages_of_the_library_are_those_of_the_last_call():
    messages = Messages()
    for severity, text in (("VERBOSE", "a"), ("WARNING", "b"), ("ERROR", "c"), ("INTERNAL_ERROR", "d")):
        messages.add(severity, text)
    assert (messages.errors, messages.warnings) == (["c", "d"], ["b"])
    messages.clear()
    assert not messages.errors + messages.warnings


def test_one_logger_for_ever():
    api = find_api("rtx")
    assert find_api("rtx") is api
    assert find_api("auto", cross=True) is api
    assert isinstance(api, Api)
