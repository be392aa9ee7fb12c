"""An adapter file that is damaged, foreign or of no use: the device keeps the one that it has, and says why."""

import hashlib
import importlib
import json
import re

import bundles
import numpy as np
import pytest
import torch
from bundles import ORT, active, call, changed
from safetensors import safe_open


def test_selftest_fails_for_an_engine_that_ignores_adapters(tmp_path, capsys, monkeypatch):
    folder = bundles.fresh("load", tmp_path)
    commands = bundles.device(folder)
    ort_run = importlib.import_module("onelora_device.ort_run")
    monkeypatch.setattr(ort_run.OnnxRuntime, "set_vectors", lambda self, vectors: None)
    assert commands.main([*ORT, "selftest"]) == 1
    text = capsys.readouterr().out
    assert "selftest FAILED" in text
    assert "default" in text


def test_every_truncation_is_refused(tmp_path, capsys):
    folder, whole = bundles.fresh("input", tmp_path), (bundles.sources() / "new.safetensors").read_bytes()
    part = tmp_path / "part.safetensors"
    for length in [*range(0, 40), *range(40, len(whole), 97), len(whole) - 1]:
        part.write_bytes(whole[:length])
        assert call(folder, "update", part, "--no-try") == 1
        assert "part.safetensors" in capsys.readouterr().err
    part.write_bytes(whole + b"x")
    assert call(folder, "update", part, "--no-try") == 1
    assert active(folder) == "default"
    assert not (folder / "local" / "state.json").exists()


def test_every_flipped_bit_is_refused_with_the_senders_hash(tmp_path):
    folder, whole = bundles.fresh("input", tmp_path), (bundles.sources() / "new.safetensors").read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    adapters, place = bundles.device(folder, "adapters"), tmp_path / "flipped.safetensors"
    bundle = adapters.Folder(str(folder))
    for position in range(0, len(whole), 211):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        place.write_bytes(flipped)
        with pytest.raises(adapters.BundleError, match="SHA-256"):
            adapters.read_adapter(str(place), bundle, digest)
    place.write_bytes(whole)
    assert call(folder, "update", place, "--sha256", digest.upper(), "--no-try") == 0


def test_no_damage_is_a_traceback(tmp_path):
    # Without the sender's hash a flipped bit of a vector is a vector; anything else is an error of one line.
    folder, whole = bundles.fresh("input", tmp_path), (bundles.sources() / "new.safetensors").read_bytes()
    adapters, place = bundles.device(folder, "adapters"), tmp_path / "damaged.safetensors"
    bundle = adapters.Folder(str(folder))
    header = 8 + int.from_bytes(whole[:8], "little")
    generator, accepted = np.random.default_rng(0), 0
    for position in range(0, header, 3):
        damaged = bytearray(whole)
        damaged[position] = generator.integers(256)
        place.write_bytes(damaged)
        try:
            adapters.read_adapter(str(place), bundle)
            accepted += 1
        except adapters.BundleError:
            pass
    assert accepted < header / 3


@pytest.mark.parametrize("missing", ["shape", "dtype", "norm", "sketch"])
@pytest.mark.parametrize("value", [None, [], "x", float("inf"), {}])
def test_fingerprints_that_are_none(missing, value, tmp_path, capsys):
    source = bundles.sources() / "new.safetensors"
    with safe_open(source, framework="pt") as file:
        prints = json.loads(file.metadata()["fingerprints"])
    if value is None:
        del prints["head"][missing]
    else:
        prints["head"][missing] = value
    path = changed(source, tmp_path / "made.safetensors", fingerprints=json.dumps(prints))
    folder = bundles.fresh("input", tmp_path)
    code = call(folder, "update", path, "--no-try")
    # A dtype that is not known has the tolerance of quantised weights, as in the package.
    assert code == (0 if (missing, value) == ("dtype", "x") else 1)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, out: bundles.sources() / "other.safetensors", r"was trained on another base: .*differs by"),
        (
            lambda a, out: changed(a, out, {"head": torch.zeros(6)}),
            r"'head' is float32 \[6\]; the model takes float32 \[5",
        ),
        (lambda a, out: changed(a, out, {"head": torch.zeros(5).half()}), r"'head' is float16"),
        (lambda a, out: changed(a, out, {"head": torch.full((5,), torch.nan)}), r"NaN or infinity in 'head'"),
        (lambda a, out: changed(a, out, {"norm.weight": torch.zeros(5)}), r"also trained norm.weight"),
        (lambda a, out: changed(a, out, format_version="9"), r"format version '9'; this script reads up to 1"),
        (lambda a, out: changed(a, out, format="pt"), r"not an adapter of onelora"),
        (lambda a, out: changed(a, out, fingerprints="{"), r"damaged metadata"),
        (lambda a, out: changed(a, out, fingerprints="{}"), r"has no vectors for"),
        (lambda a, out: changed(a, out, fingerprints='{"head": {"sketch": "AAAA"}}'), r"damaged metadata"),
        (lambda a, out: out, r"there is no file"),
    ],
)
def test_adapters_that_do_not_belong(make, message, tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    path = make(bundles.sources() / "new.safetensors", tmp_path / "made.safetensors")
    assert call(folder, "update", path) == 1
    assert re.search(message, capsys.readouterr().err)
    assert active(folder) == "default"
    assert not (folder / "local" / "adapters").exists()


def test_an_adapter_that_makes_nan_is_not_put_in_use(tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    huge = {"embed": torch.full((48,), 3e38)}
    path = changed(bundles.sources() / "new.safetensors", tmp_path / "huge.safetensors", huge)
    assert call(folder, "update", path) == 1
    assert "is NaN or infinite" in capsys.readouterr().err
    assert active(folder) == "default"


def test_an_installed_file_that_rots_is_found(tmp_path, capsys):
    folder, sources = bundles.fresh("input", tmp_path), bundles.sources()
    assert call(folder, "update", sources / "new.safetensors", "--no-try") == 0
    (file,) = (folder / "local" / "adapters").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    assert call(folder, "selftest") == 1
    assert "is damaged or another file: its SHA-256" in capsys.readouterr().err
    assert call(folder, "rollback") == 0
    assert call(folder, "selftest") == 0


def test_a_bundle_that_was_damaged_on_its_way(tmp_path, capsys):
    folder = bundles.fresh("fold", tmp_path)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    (folder / "reference" / "min.safetensors").unlink()
    assert call(folder, "selftest") == 1
    text = capsys.readouterr().err
    assert "model.onnx: other content" in text
    assert "reference/min.safetensors: missing" in text
    assert call(folder, "status") == 1
    (folder / "manifest.json").write_text("{")
    assert call(folder, "status") == 1
    assert "manifest.json is damaged" in capsys.readouterr().err
