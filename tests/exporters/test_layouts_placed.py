"""An update of some kilobytes ends in an engine where a stock runtime looks for it; with a double of TensorRT."""

import shutil
import sys

import bundles
import cudart_double
import numpy as np
import onnxruntime
import power_cut
import pytest
import tensorrt_double
from bundles import for_runtime
from killer import calls_of, killed

from onelora_compile.weights.adapter_file import read_adapter

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")


@pytest.fixture
def device(tmp_path, monkeypatch):
    cudart = cudart_double.compile_cudart(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx))
    return lambda folder, *args: bundles.run(folder, "--libcudart", cudart, *args)


def served(folder):
    """What a program that knows nothing of adapters gets from the engine in Triton's repository."""
    trt = tensorrt_double.module(rtx)
    plan = (folder / "triton" / "model" / "1" / "model.plan").read_bytes()
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)._double
    assert engine.inputs == {"x"}
    return engine.session.run(None, {"x": X})[0]


X = np.random.default_rng(0).normal(size=(3, 16, 12)).astype(np.float32)


def expected(name):
    """With an adapter, by a model in which it is an input."""
    sources = bundles.sources()
    vectors = read_adapter(sources / f"{name}.safetensors").vectors
    session = onnxruntime.InferenceSession(sources / "input.onnx")
    return session.run(None, {"x": X, **{key: value.numpy() for key, value in vectors.items()}})[0]


def close(found, wanted):
    return np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("mode", ["load", "refit"])
def test_an_update_ends_in_an_engine_where_the_runtime_looks(mode, tmp_path, device, capsys):
    folder, sources = for_runtime(mode, tmp_path), bundles.sources()
    assert device(folder, "status") == 1
    assert "triton/model/1/model.plan: no engine is there: run `build`" in capsys.readouterr().out
    assert device(folder, "build") == 0
    assert "placed: " in capsys.readouterr().out
    first = served(folder)
    assert device(folder, "update", sources / "new.safetensors") == 0
    assert close(served(folder), expected("new"))
    assert not close(served(folder), first)
    assert device(folder, "use", "a") == 0
    assert close(served(folder), expected("a"))
    assert not close(served(folder), expected("new"))
    assert device(folder, "rollback") == 0
    assert close(served(folder), expected("new"))
    assert device(folder, "update", sources / "other.safetensors") == 1
    assert close(served(folder), expected("new"))
    capsys.readouterr()
    assert device(folder, "status") == 0
    assert "triton/model/1/model.plan: with the adapter in use" in capsys.readouterr().out
    assert device(folder, "rollback") == 0
    assert close(served(folder), first)
    assert [path.name for path in (folder / "triton" / "model" / "1").iterdir()] == ["model.plan"]


def test_a_folded_model_is_placed_by_build(tmp_path, device):
    folder = for_runtime("fold", tmp_path)
    assert device(folder, "build") == 0
    assert close(served(folder), expected("c"))  # what it was exported with


def test_an_engine_that_is_written_with_the_adapter_before_is_refused(tmp_path, device, monkeypatch, capsys):
    folder = for_runtime("refit", tmp_path)
    assert device(folder, "build") == 0
    before = served(folder)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx, stale=True))
    assert device(folder, "update", bundles.sources() / "new.safetensors") == 1
    assert "computes another" in capsys.readouterr().err
    assert close(served(folder), before)
    assert bundles.active(folder) == "default"


def test_another_engine_in_the_place_is_told(tmp_path, device, capsys):
    folder = for_runtime("refit", tmp_path)
    assert device(folder, "build") == 0
    plan = folder / "triton" / "model" / "1" / "model.plan"
    plan.write_bytes(plan.read_bytes() + b" ")
    assert device(folder, "status") == 1
    assert "is not the one with the adapter in use: run `build`" in capsys.readouterr().out
    assert device(folder, "build") == 0
    assert device(folder, "status") == 0


def test_onnxruntime_says_that_it_places_nothing(tmp_path, capsys):
    folder = for_runtime("refit", tmp_path)
    assert bundles.call(folder, "update", bundles.sources() / "new.safetensors") == 0
    assert "model.plan is as it was: it is for TensorRT, and this is onnxruntime" in capsys.readouterr().out


def test_killed_at_any_moment_the_place_has_the_old_engine_or_the_new(tmp_path, device):
    folder = for_runtime("refit", tmp_path)
    assert device(folder, "build") == 0
    kept = shutil.copytree(folder, tmp_path / "kept")
    cudart = next(tmp_path.glob("*cudart*.so*"))
    update = ("update", bundles.sources() / "new.safetensors", "--no-try")
    command = (folder, "--libcudart", cudart, *update)
    total = calls_of(*command, double=True)
    old, new = served(kept), expected("new")
    seen = []
    for calls in range(1, total + 1):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        assert killed(calls, *command, double=True)[0] == -9
        found = served(folder)
        assert close(found, old) or close(found, new)
        seen.append((close(found, new), bundles.active(folder) == "new"))
    # First the engine, then what the bundle says is in use.
    assert seen == sorted(seen)
    assert set(seen) == {(False, False), (True, False), (True, True)}
    assert device(folder, *update) == 0
    assert device(folder, "status") == 0
    assert [path.name for path in (folder / "triton" / "model" / "1").iterdir()] == ["model.plan"]


@pytest.mark.parametrize("mode", ["refit", pytest.param("load", marks=pytest.mark.slow)])
def test_after_a_cut_of_power_the_place_has_the_old_engine_or_the_new(mode, tmp_path, device):
    """And the adapter in use has an engine: nothing is to be built before the device works."""
    folder = for_runtime(mode, tmp_path)
    assert device(folder, "build") == 0
    old, new, seen = served(folder), expected("new"), []
    with power_cut.watched(folder) as disk:
        assert device(folder, "update", bundles.sources() / "new.safetensors", "--no-try") == 0
    for over, content in disk.states():
        power_cut.write(content, folder)
        found = served(folder)
        assert close(found, old) or close(found, new)
        seen.append((close(found, new), bundles.active(folder) == "new"))
        assert all(seen[-1]) or not over  # what was said to be done is
        assert device(folder, "selftest") == 0
    assert set(seen) == {(False, False), (True, False), (True, True)}
