"""Over the air: an adapter file arrives, is in use, and can be taken back.

ONNX Runtime is the engine; the files and the steps are those of the device.
"""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import bundles
import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from bundles import ORT, active, call, changed, exported
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import bundle
from onelora_compile.weights import fingerprint
from onelora_compile.weights.adapter_file import read_adapter


def command(folder, *args, **options):
    """A bundle's command line in a process of its own, without this package."""
    done = [sys.executable, "-I", "-W", "error", folder / "build_and_run.py", *map(str, args)]
    return subprocess.run(done, capture_output=True, text=True, check=False, cwd=folder.parent, **options)


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
    assert "engines   none: run build" in status.stdout
    assert "engines   none, and none are needed" in command(folder, *ORT, "status").stdout


class Two(nn.Module):
    """One linear, given twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        y = self.linear(x)
        return y, -y


@pytest.mark.parametrize(
    ("outputs", "into", "error"),
    [
        (("a/b", "a.b"), "out", None),
        (("a/b", "a_b"), "out", "output 'a_b' would be written over output 'a/b'"),
        (("y", "given"), ".", "output 'given' would be written over an input"),
    ],
)
def test_run_writes_over_nothing(outputs, into, error, tmp_path):
    x = torch.randn(2, 6)
    model = exported(Two(), (x,), tmp_path / "two.onnx", output_names=list(outputs))
    folder = tmp_path / "b"
    bundle(model, folder, shapes={"x": ((2, 6),) * 3})
    np.save(tmp_path / "given.npy", x.numpy())
    done = command(folder, *ORT, "run", f"x={tmp_path / 'given.npy'}", "-o", tmp_path / into)
    np.testing.assert_array_equal(np.load(tmp_path / "given.npy"), x.numpy())
    if error is None:
        assert done.returncode == 0, done.stderr
        first, second = (np.load(tmp_path / into / f"{name.replace('/', '_')}.npy") for name in outputs)
        np.testing.assert_array_equal(first, -second)
    else:
        assert done.returncode == 1
        assert error in done.stderr
        assert len(list(tmp_path.rglob("*.npy"))) == 1 + len(list(folder.rglob("*.npy")))


@pytest.mark.parametrize("mode", bundles.MODES)
def test_selftest_without_the_package(mode, tmp_path):
    folder = bundles.fresh(mode, tmp_path)
    done = command(folder, *ORT, "selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selftest passed" in done.stdout
    assert "on the CPU (not TensorRT)" in done.stdout
    assert ("default (again)" in done.stdout) == (mode in ("input", "load", "refit"))
    assert ("(built)" in done.stdout) == (mode == "refit")


def test_selftest_says_when_it_can_not_tell(tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    assert call(folder, "selftest", "--tolerance", "100") == 0
    assert "can't tell it from the base" in capsys.readouterr().out


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
    for batch, ids in ((x[:1], [0, 1, 0]), (x, [0])):
        with pytest.raises(deployed.BundleError, match=f"are not one for each of the {len(batch)} rows"):
            model.run({"x": batch, "adapter_ids": np.array(ids)})


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


@pytest.mark.parametrize("shape", [(1, 16, 11), (16, 12)])
def test_an_input_of_another_shape_is_named(shape, tmp_path):
    deployed = bundles.device(folder := bundles.fresh("input", tmp_path), "deployed")
    model = deployed.Deployed(str(folder), deployed.Options(runtime="onnxruntime"))
    with pytest.raises(deployed.BundleError, match=r"input 'x' is .*takes \[-1, 16, 12\]"):
        model.run({"x": np.ones(shape, np.float32)})
