"""The device's program behind the API of real bindings: what it calls, what it feeds, what it says.

Nothing here runs on a GPU.  What an engine computes is ONNX Runtime's (tensorrt_double.py).
"""

import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path

import bundles
import cudart_double
import numpy as np
import onnxruntime
import pytest
import tensorrt_bindings
import tensorrt_double
from bundles import drive, plans, run

from onelora_compile.weights.adapter_file import read_adapter

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")


@pytest.fixture
def cudart(tmp_path):
    return cudart_double.compile_cudart(tmp_path)


@pytest.mark.parametrize("mode", bundles.MODES)
def test_the_whole_life_of_a_bundle_with_a_double(mode, tmp_path, monkeypatch, cudart):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    folder = bundles.fresh(mode, tmp_path)
    trt = drive(folder, cudart, rtx, bundles.sources())
    record = json.loads(plans(folder)[0].with_suffix(".json").read_text())
    plan = json.loads(plans(folder)[0].read_text())
    assert record["identity"]["sm"] == "8.7"
    assert plan["workspace"] == 512 << 20
    assert plan["ranges"]["x"] == [[1, 16, 12], [2, 16, 12], [4, 16, 12]]
    assert bool(plan["marked"]) == (mode == "refit")
    assert ("REFIT_INDIVIDUAL" in plan["config"]) == (mode == "refit")
    assert "IExecutionContext.execute_async_v3" in trt.calls
    state = json.loads((folder / "local" / "state.json").read_text()) if mode in ("input", "load", "refit") else None
    assert state is None or state["adapter"]["name"] == "new"


@pytest.mark.parametrize("mode", ["input", "refit"])
def test_outputs_are_the_models_and_memory_stays_where_it_is(mode, tmp_path, monkeypatch, cudart):
    folder, sources = bundles.fresh(mode, tmp_path), bundles.sources()
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx))
    assert run(folder, "--libcudart", cudart, "build") == 0
    deployed = bundles.device(folder, "deployed")
    options = bundles.device(folder, "options").Options(library=str(cudart))
    deployed = bundles.device(folder, "deployed")
    model = deployed.Deployed(str(folder), options)
    addresses = {name: memory.address for name, memory in model.engine.memory.items()}
    session = onnxruntime.InferenceSession(sources / "input.onnx")
    for batch, adapter in ((3, "a"), (1, "b"), (4, "base"), (2, "a")):
        x = np.random.default_rng(batch).normal(size=(batch, 16, 12)).astype(np.float32)
        model.use(adapter)
        known = read_adapter(sources / "a.safetensors").vectors
        if adapter == "base":
            vectors = {name: np.zeros_like(vector.numpy()) for name, vector in known.items()}
        else:
            found = read_adapter(sources / f"{adapter}.safetensors").vectors
            vectors = {name: vector.numpy() for name, vector in found.items()}
        (expected,) = session.run(None, {"x": x, **vectors})
        (found,) = model.run({"x": x}).values()
        np.testing.assert_array_equal(found.numpy(), expected)
    assert {name: memory.address for name, memory in model.engine.memory.items()} == addresses
    with pytest.raises(Exception, match=r"input 'x' is \[5, 16, 12\]; the engine takes \[1, 16, 12\] to \[4, 16, 12\]"):
        model.run({"x": np.zeros((5, 16, 12), np.float32)})
    with pytest.raises(Exception, match=r"the model takes x; given were y"):
        model.run({"y": np.zeros((1, 16, 12), np.float32)})


def test_memory_and_stream_of_an_engine_are_given_back(tmp_path, monkeypatch, cudart):
    folder = bundles.fresh("load", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx))
    for name in ("a", "b"):
        assert run(folder, "--libcudart", cudart, "use", name) == 0
    options = bundles.device(folder, "options").Options(library=str(cudart))
    model = importlib.import_module("onelora_device.deployed").Deployed(str(folder), options)
    live = ctypes.CDLL(str(cudart)).allocations
    before = live()
    assert before == len(model.engine.memory) + 1  # and a stream
    for name in ("a", "b", "a"):  # each adapter has an engine of its own
        model.use(name)
        assert live() == before


def test_a_bundle_for_another_release_says_so(tmp_path, capsys, monkeypatch, cudart):
    trt = tensorrt_double.module(rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    for version, said in (("10.3.0", False), ("8.5.2", True)):
        trt.__version__ = version
        assert run(bundles.fresh("fold", tmp_path / version), "--libcudart", cudart, "build") == 0
        assert ("made for TensorRT 10.3.0 (JetPack 6.2), here is 8.5.2" in capsys.readouterr().out) == said


def test_what_the_builder_says_is_told_with_what_helps(tmp_path, capsys, monkeypatch, cudart):
    message = "Could not find any implementation for node {ForeignNode[a...b]}"
    folder = bundles.fresh("fold", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx, build=message))
    assert run(folder, "--libcudart", cudart, "build") == 1
    text = capsys.readouterr().err
    assert f"TensorRT could not build the engine:\n  {message}\n  -> the builder found no kernel" in text


def test_an_engine_of_another_version_is_refused_by_name(tmp_path, monkeypatch, capsys, cudart):
    folder = bundles.fresh("fold", tmp_path)
    trt = tensorrt_double.module(rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert run(folder, "--libcudart", cudart, "selftest") == 1
    assert "there is no engine yet: run `build` first" in capsys.readouterr().err
    assert run(folder, "--libcudart", cudart, "build") == 0
    trt.__version__ = "99.1"
    assert run(folder, "--libcudart", cudart, "selftest") == 1
    assert "now '99.1'" in capsys.readouterr().err
    trt.__version__ = rtx.__version__
    plan = plans(folder)[0]
    plan.write_bytes(plan.read_bytes()[:-1])
    assert run(folder, "--libcudart", cudart, "selftest") == 1
    assert "is damaged: run `build --force`" in capsys.readouterr().err


def test_weights_that_the_engine_has_combined_are_an_error(tmp_path, monkeypatch, capsys, cudart):
    folder = bundles.fresh("refit", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx, missing="head.weight"))
    assert run(folder, "--libcudart", cudart, "build") == 0
    assert run(folder, "--libcudart", cudart, "selftest") == 1
    assert "wants those too: head.weight. Make the bundle with swap='input'" in capsys.readouterr().err


def test_timing_cache_is_kept_also_when_the_build_fails(tmp_path, monkeypatch, cudart):
    folder = bundles.fresh("fold", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx, build="broken"))
    assert run(folder, "--libcudart", cudart, "build") == 1
    (cache,) = (folder / "local" / "engines").glob("timing-*.cache")
    assert cache.read_bytes() == b"."
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx))
    assert run(folder, "--libcudart", cudart, "build") == 0
    assert cache.read_bytes() == b".."
    cache.write_bytes(b"damaged")
    assert run(folder, "--libcudart", cudart, "build", "--force") == 0
    assert cache.read_bytes() == b"."


def test_no_module_in_a_virtual_environment(tmp_path, monkeypatch, capsys):
    folder = bundles.fresh("fold", tmp_path)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert run(folder, "build") == 1
    assert "--system-site-packages" in capsys.readouterr().err
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert run(folder, "build") == 1
    assert "apt install python3-libnvinfer" in capsys.readouterr().err


def test_a_module_whose_libraries_are_gone(tmp_path, monkeypatch, capsys):
    folder = bundles.fresh("fold", tmp_path)
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvdla_compiler.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(folder, "build") == 1
    assert "can't be loaded: libnvdla_compiler.so" in capsys.readouterr().err


DRIVER = """
import sys
sys.path[:0] = {paths!r}
import tensorrt_bindings as real
from pathlib import Path
from bundles import drive
trt = drive(Path({folder!r}), Path({cudart!r}), real, Path({sources!r}))
print("calls", trt.__version__, " ".join(sorted(trt.calls)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", tensorrt_bindings.WHEELS)
@pytest.mark.parametrize("mode", bundles.MODES)
def test_the_real_bindings_have_what_is_called(mode, version, tmp_path, cudart):
    place = tensorrt_bindings.unpacked(version)
    folder = bundles.fresh(mode, tmp_path, "6.0" if version[0] == "8" and mode != "refit" else "6.2")
    text = DRIVER.format(
        paths=[str(place), str(Path(__file__).parent.parent)],
        folder=str(folder),
        cudart=str(cudart),
        sources=str(bundles.sources()),
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={"LD_LIBRARY_PATH": str(place), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    if mode == "refit" and version[0] == "8":
        assert "can't refit single weights (10.2 and newer can" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"calls {version}" in done.stdout
    assert "Builder.build_serialized_network" in done.stdout
