"""What a bundle gives to people who use Polygraphy: its stored tensors, and a command line of that TensorRT's flags."""

import os
import subprocess
import sys
from pathlib import Path

import bundles
import numpy as np
import onnxruntime
import pytest

from onelora_compile.exporters import bundle


def stored(folder):
    return bundles.device(folder, "stored"), bundles.device(folder, "folder").Folder(str(folder))


@pytest.mark.parametrize("mode", bundles.MODES)
def test_the_stored_outputs_are_those_of_the_model_with_the_stored_inputs(mode, tmp_path):
    folder = bundles.fresh(mode, tmp_path)
    module, held = stored(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [node.name for node in session.get_outputs()]
    cases = list(zip(module.feeds(held), module.expected(held), strict=True))
    assert len(cases) == 2
    for feed, expected in cases:
        assert set(feed) == {node.name for node in session.get_inputs()}  # vectors and rows too
        assert set(expected) == set(names)
        for name, found in zip(names, session.run(None, feed), strict=True):
            np.testing.assert_array_equal(found, expected[name])


@pytest.mark.parametrize(
    ("jetpack", "options", "has", "hasnot"),
    [
        ("5.1", {}, ["--tf32", "x:[1,16,12]"], ["--builder-optimization-level", "--strongly-typed", "--fp16"]),
        ("6.0", {"weak_fp16": True}, ["--fp16", "--builder-optimization-level=3"], ["--strongly-typed"]),
        ("6.2", {}, ["--strongly-typed", "--pool-limit=workspace:512M", "x:[4,16,12]"], ["--fp16", "--tf32"]),
    ],
)
def test_polygraphy_has_the_flags_of_the_release(jetpack, options, has, hasnot, tmp_path):
    bundle(bundles.sources() / "fold.onnx", tmp_path / "b", jetpack=jetpack, shapes=bundles.SHAPES, **options)
    script = tmp_path / "b" / "polygraphy.sh"
    text = script.read_text()
    assert all(part in text for part in has)
    assert not any(part in text for part in hasnot)
    assert os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_a_bundle_without_reference_tensors_has_nothing_to_compare_with(tmp_path):
    bundle(bundles.sources() / "fold.onnx", tmp_path / "b", shapes=bundles.SHAPES, selftest=False)
    assert not (tmp_path / "b" / "polygraphy.sh").exists()
    assert "polygraphy" not in (tmp_path / "b" / "README.md").read_text()


def polygraphy(folder, place, *arguments, backend="--onnxrt"):
    pytest.importorskip("polygraphy", reason="make test-real installs Polygraphy")
    (place / "tool.py").write_text("import sys\nfrom polygraphy.tools import main\nsys.exit(main())\n")
    environment = {
        **os.environ,
        "BACKEND": backend,
        "POLYGRAPHY": f"{sys.executable} {place / 'tool.py'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(sys.path),
    }
    return subprocess.run(
        ["sh", folder / "polygraphy.sh", *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.real
def test_the_real_polygraphy_passes_and_fails(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    done = polygraphy(folder, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 2/2 iterations" in done.stdout
    module = folder / "onelora_device" / "stored.py"
    module.write_text(
        module.read_text().replace("[len(begin) :]: value.numpy()", "[len(begin) :]: value.numpy() + 0.01")
    )
    done = polygraphy(folder, tmp_path)
    assert done.returncode == 1  # it is the stored outputs that it compares with
    assert "Passed: 0/2 iterations" in done.stdout


@pytest.mark.real
def test_the_real_polygraphy_takes_the_options_of_tensorrt(tmp_path):
    folder = bundles.fresh("bank", tmp_path)
    done = polygraphy(folder, tmp_path, "--gen-script", str(tmp_path / "made.py"), backend="--trt")
    assert done.returncode == 0, done.stdout + done.stderr
    made = (tmp_path / "made.py").read_text()
    assert "strongly_typed=True" in made
    assert "add('adapter_ids', min=[1], opt=[2], max=[4])" in made
    assert "WORKSPACE: 536870912" in made
