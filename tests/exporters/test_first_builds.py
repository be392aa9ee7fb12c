"""A first build takes minutes: what is told meanwhile, and what makes the next one short."""

import importlib
import json
import re
import sys
import time

import bundles
import cudart_double
import pytest
import tensorrt_double
from bundles import plans, run

import onelora_compile as onelora
from onelora_compile.exporters import bundle
from onelora_compile.exporters.jetson.device.core.progress import Earlier, Line

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A device with TensorRT 10.3, of real bindings before a double: its command line."""
    cudart, trt = cudart_double.compile_cudart(tmp_path), tensorrt_double.module(rtx)
    trt.__version__ = "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return lambda folder, *args: run(folder, "--libcudart", cudart, *args)


def record_of(folder):
    return json.loads(plans(folder)[0].with_suffix(".json").read_text())


def test_nvidias_builder_leaves_the_times_of_its_phases(tmp_path):
    folder = bundles.fresh("load", tmp_path)
    assert run(folder, "--runtime", "tensorrt_rtx", "build", "--sm", "86") == 0
    record = record_of(folder)
    starts = [start for _, start in record["phases"]]
    assert "Building engine" in [name for name, _ in record["phases"]]
    assert starts == sorted(starts)
    assert 0 <= starts[-1] <= record["seconds"]


def test_what_is_told_while_nvidias_builder_is_in_one_step(tmp_path, monkeypatch, capsys):
    # The second build of a device: TensorRT-RTX is nearly all the time in one step of one phase.
    folder = bundles.fresh("load", tmp_path)
    assert run(folder, "--runtime", "tensorrt_rtx", "build", "--sm", "86") == 0
    record = plans(folder)[0].with_suffix(".json")
    record.write_text(json.dumps({**record_of(folder), "seconds": 600.0, "phases": []}))
    main = bundles.device(folder).main
    progress = importlib.import_module("onelora_device.core.progress")
    often = progress.Line
    build = importlib.import_module("onelora_device.trt_build")
    monkeypatch.setattr(build, "Line", lambda earlier: often(earlier, period=0.05))
    capsys.readouterr()
    assert main(["--runtime", "tensorrt_rtx", "use", "a", "--sm", "86"]) == 0  # another adapter, another engine
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(r"building: [01]/1 Building engine from subgraph, .* about 10 min left", x) for x in lines)


@pytest.mark.parametrize(
    ("phase", "elapsed", "inside", "left"),
    [("tactics", 60, 10, 490), ("new", 60, 10, 540), ("", 700, 700, -100), ("tactics", 900, 800, -300)],
)
def test_the_time_that_is_left_is_of_the_build_before(phase, elapsed, inside, left):
    earlier = Earlier(600.0, [["fusion", 0.0], ["tactics", 100.0]])
    assert earlier.left(phase, elapsed, inside) == pytest.approx(left)


def test_a_slower_build_is_told_no_time(monkeypatch):
    line = Line(Earlier(600.0))
    monkeypatch.setattr(time, "monotonic", lambda: line.begun + 700)
    assert line.text() == "12 min so far, the build before took 10 min"


def test_a_first_build_tells_by_its_steps(monkeypatch):
    line = Line()
    line.start("tactics", 40)
    for _ in range(10):
        line.step()
    assert line.text() == "10/40 tactics, 0 s so far"
    monkeypatch.setattr(time, "monotonic", lambda: line.begun + 60)
    assert line.text() == "10/40 tactics, 60 s so far, about 3 min left of this phase"


def test_the_last_build_of_this_model_here_is_what_counts(tmp_path, device):
    folder = bundles.fresh("load", tmp_path)
    for name in ("a", "b"):
        assert device(folder, "use", name) == 0
    for index, plan in enumerate(plans(folder)):
        path = plan.with_suffix(".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 100.0 * (index + 1), "built": index}))
    build = bundles.device(folder, "trt_build")
    held = importlib.import_module("onelora_device.folder").Folder(str(folder))
    known = sys.modules["tensorrt"]
    assert build.Plan(held, known, "8.7", held.find("base")).earlier().seconds == 200.0
    assert build.Plan(held, known, "7.2", held.find("base")).earlier() is None


def test_a_timing_cache_goes_from_one_device_to_the_next(tmp_path, device):
    first = bundles.fresh("load", tmp_path / "first")
    assert device(first, "build") == 0
    (cache,) = (first / "local" / "engines").glob("timing-*.cache")
    timed = cache.read_bytes()
    bundle(
        bundles.sources() / "load.onnx",
        tmp_path / "b",
        shapes=bundles.SHAPES,
        adapters=[bundles.sources() / "a.safetensors"],
        timing_caches=[cache],
    )
    assert (tmp_path / "b" / "timing" / cache.name).read_bytes() == timed
    assert f"timing/{cache.name}" in json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]
    assert device(tmp_path / "b", "build") == 0
    kept = tmp_path / "b" / "local" / "engines" / cache.name
    assert kept.read_bytes() == timed + b"."  # the double's cache grows by one with each build that it served
    assert device(tmp_path / "b", "use", "a") == 0  # a later build continues from the device's own
    assert kept.read_bytes() == timed + b".."


def test_a_timing_cache_of_another_device_is_told(tmp_path, device, capsys):
    place = tmp_path / "timing-tensorrt-10.3.0-8.7.cache"
    place.write_bytes(b"damaged")
    bundle(bundles.sources() / "fold.onnx", tmp_path / "b", shapes=bundles.SHAPES, timing_caches=[place])
    assert device(tmp_path / "b", "build") == 0
    assert "note: the timing cache of the bundle is not of this device" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cache", "timing-tensorrt-10.3.0-8.7.cache.tmp", "timing-tensorrt_rtx-1.7-8.6.cache"])
def test_another_file_is_no_timing_cache(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(onelora.ConfigError, match="is not a file that `build` kept on a device"):
        bundle(bundles.sources() / "fold.onnx", tmp_path / "b", shapes=bundles.SHAPES, timing_caches=[tmp_path / name])
    assert not (tmp_path / "b").exists()


def test_the_adapter_in_use_stays_until_its_engine_is_there(tmp_path, device, monkeypatch):
    folder = bundles.fresh("load", tmp_path)
    assert device(folder, "build") == 0
    (engine,) = plans(folder)
    full = tensorrt_double.module(rtx, build="OutOfMemory")
    full.__version__ = "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    assert device(folder, "update", bundles.sources() / "new.safetensors") == 1
    assert bundles.active(folder) == "default"
    assert plans(folder) == [engine]
