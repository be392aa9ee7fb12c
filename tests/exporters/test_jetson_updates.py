"""Over the air: what a device does with an adapter file that arrives, whole, damaged, foreign, or while the power goes.

ONNX Runtime is the engine; the files and the steps are those of the device.
"""

import errno
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import bundles
import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from bundles import ORT, active, call
from safetensors import safe_open
from safetensors.torch import save_file

import onelora_compile as onelora
from onelora_compile.weights import fingerprint
from onelora_compile.weights.adapter_file import read_adapter


def command(folder, *args, **options):
    """A bundle's command line in a process of its own, without this package."""
    done = [sys.executable, "-I", "-W", "error", folder / "build_and_run.py", *map(str, args)]
    return subprocess.run(done, capture_output=True, text=True, check=False, cwd=folder.parent, **options)


def changed(path, out, tensors=None, **metadata):
    """A copy of an adapter file with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}
        known = file.metadata()
    save_file({**held, **(tensors or {})}, out, {**known, **metadata})
    return out


@pytest.mark.parametrize("mode", ["input", "load", "refit"])
def test_an_adapter_file_alone_updates_a_device(mode, tmp_path):
    folder, sources = bundles.fresh(mode, tmp_path), bundles.sources()
    x = np.random.default_rng(0).normal(size=(3, 16, 12)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)

    def outputs():
        done = command(folder, *ORT, "run", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / "out").iterdir()
        return np.load(file)

    def expected(name):
        session = onnxruntime.InferenceSession(sources / "input.onnx")
        vectors = read_adapter(sources / f"{name}.safetensors").vectors
        return session.run(None, {"x": x, **{key: value.numpy() for key, value in vectors.items()}})[0]

    shutil.copy(sources / "new.safetensors", tmp_path / "arrived.safetensors")
    done = command(folder, *ORT, "update", tmp_path / "arrived.safetensors")
    assert done.returncode == 0, done.stderr
    assert "in use: arrived" in done.stdout
    (tmp_path / "arrived.safetensors").unlink()
    np.testing.assert_allclose(outputs(), expected("new"), rtol=1e-4, atol=1e-5)
    assert command(folder, *ORT, "use", "a").returncode == 0
    np.testing.assert_allclose(outputs(), expected("a"), rtol=1e-4, atol=1e-5)
    assert command(folder, *ORT, "rollback").returncode == 0
    np.testing.assert_allclose(outputs(), expected("new"), rtol=1e-4, atol=1e-5)
    assert np.abs(expected("new") - expected("a")).max() > 0.01
    status = command(folder, "status")
    assert status.returncode == 0
    assert "adapter   arrived" in status.stdout


@pytest.mark.parametrize("mode", bundles.MODES)
def test_selftest_without_the_package(mode, tmp_path):
    folder = bundles.fresh(mode, tmp_path)
    done = command(folder, *ORT, "selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selftest passed" in done.stdout
    assert "on the CPU (not TensorRT)" in done.stdout
    assert ("default (again)" in done.stdout) == (mode in ("input", "load", "refit"))
    assert ("(built)" in done.stdout) == (mode == "refit")


def test_selftest_fails_for_an_engine_that_ignores_adapters(tmp_path, capsys, monkeypatch):
    folder = bundles.fresh("load", tmp_path)
    commands = bundles.device(folder)
    ort_run = importlib.import_module("onelora_device.ort_run")
    monkeypatch.setattr(ort_run.OnnxRuntime, "set_vectors", lambda self, vectors: None)
    assert commands.main([*ORT, "selftest"]) == 1
    text = capsys.readouterr().out
    assert "selftest FAILED" in text
    assert "default" in text


def test_selftest_says_when_it_can_not_tell(tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    assert call(folder, "selftest", "--tolerance", "100") == 0
    assert "can't tell it from the base" in capsys.readouterr().out


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


def test_the_same_tolerances_as_the_package(tmp_path):
    adapters = bundles.device(bundles.fresh("input", tmp_path), "adapters")
    assert adapters.TOLERANCE == fingerprint.TOLERANCE
    assert adapters.TOLERANCE_OTHER == fingerprint._TOLERANCE_OTHER


def test_a_base_that_was_rounded_to_half_is_the_same_base(tmp_path):
    torch.manual_seed(0)
    model = onelora.load_adapter(zoo.TinyViT(), bundles.sources() / "new.safetensors")
    onelora.save_adapter(model.half(), tmp_path / "half.safetensors")
    folder = bundles.fresh("input", tmp_path)
    assert call(folder, "update", tmp_path / "half.safetensors") == 0


def test_rollback_goes_back_step_by_step_and_ends(tmp_path, capsys):
    folder, sources = bundles.fresh("input", tmp_path), bundles.sources()
    assert call(folder, "rollback") == 1
    assert "no adapter to go back to" in capsys.readouterr().err
    for name in ("new", "c"):
        assert call(folder, "update", sources / f"{name}.safetensors", "--no-try") == 0
    assert call(folder, "update", sources / "c.safetensors", "--no-try") == 0  # the same once more
    for expected in ("new", "default"):
        assert call(folder, "rollback") == 0
        assert active(folder) == expected
    assert call(folder, "rollback") == 1


def test_a_name_that_is_packed_does_not_hide_the_packed_one(tmp_path):
    folder, sources = bundles.fresh("input", tmp_path), bundles.sources()
    shutil.copy(sources / "new.safetensors", tmp_path / "a.safetensors")
    assert call(folder, "update", tmp_path / "a.safetensors", "--no-try") == 0
    assert active(folder).startswith("a-")
    assert call(folder, "use", "a") == 0
    state = json.loads((folder / "local" / "state.json").read_text())
    assert state["adapter"]["file"] == "adapters/a.safetensors"


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


def test_old_adapters_are_removed_and_those_to_go_back_to_are_not(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    for number in range(14):
        path = changed(
            bundles.sources() / "new.safetensors",
            tmp_path / "same-name.safetensors",
            {"head": torch.full((5,), float(number))},
        )
        assert call(folder, "update", path, "--no-try") == 0
    state = json.loads((folder / "local" / "state.json").read_text())
    files = {file.name for file in (folder / "local" / "adapters").glob("*.safetensors")}
    known = {os.path.basename(one["file"]) for one in [state["adapter"], *state["previous"]]}
    assert files == known
    assert len(state["previous"]) == 8


def test_two_updates_at_once(tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    with bundles.device(folder, "folder").Folder(str(folder)).lock():
        assert call(folder, "update", bundles.sources() / "new.safetensors") == 1
    assert "another program is changing this bundle" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["fold", "bank"])
def test_models_that_take_no_file_say_why(mode, tmp_path, capsys):
    folder = bundles.fresh(mode, tmp_path)
    assert call(folder, "update", bundles.sources() / "new.safetensors") == 1
    text = capsys.readouterr().err
    assert "another adapter is another ONNX model" in text if mode == "fold" else "one more is a new bundle" in text
    assert call(folder, "use", "b") == (1 if mode == "fold" else 0)


def test_a_running_program_takes_over_an_update(tmp_path):
    folder, sources = bundles.fresh("input", tmp_path), bundles.sources()
    deployed = bundles.device(folder, "deployed")
    model = deployed.Deployed(str(folder), deployed.Options(runtime="onnxruntime"))
    x = np.ones((2, 16, 12), np.float32)
    (before,) = model.run({"x": x}).values()
    assert not model.refresh()
    assert command(folder, *ORT, "update", sources / "new.safetensors").returncode == 0
    assert model.refresh()
    (after,) = model.run({"x": x}).values()
    assert np.abs(before.numpy() - after.numpy()).max() > 0.01
    assert model.adapter["name"] == "new"


def test_rows_of_a_bank(tmp_path):
    folder = bundles.fresh("bank", tmp_path)
    deployed = bundles.device(folder, "deployed")
    model = deployed.Deployed(str(folder), deployed.Options(runtime="onnxruntime"))
    x = np.random.default_rng(0).normal(size=(1, 16, 12)).astype(np.float32).repeat(3, 0)
    (mixed,) = model.run({"x": x, "adapter_ids": np.array([1, -1, 0])}).values()
    for row, name in enumerate(("b", "base", "a")):
        model.use(name)
        (alone,) = model.run({"x": x}).values()
        np.testing.assert_allclose(mixed.numpy()[row], alone.numpy()[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(deployed.BundleError, match=r"adapter_ids \[2, 0, 0\] are not all between -1 .* and 1"):
        model.run({"x": x, "adapter_ids": np.array([2, 0, 0])})


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


def test_a_full_disk_behind_standard_output_undoes_nothing(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    folder, sources = bundles.fresh("input", tmp_path), bundles.sources()
    monkeypatch.setattr(sys, "stdout", Full())
    assert call(folder, "update", sources / "new.safetensors", "--no-try") == 0
    assert active(folder).startswith("new")
    assert call(folder, "use", "a") == 0
    assert active(folder) == "a"
    assert call(folder, "rollback") == 0
    assert active(folder).startswith("new")
