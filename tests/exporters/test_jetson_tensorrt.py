"""The device's program and TensorRT: real builds with TensorRT-RTX, real bindings of every JetPack's version.

Nothing here runs on a GPU.  What an engine computes is checked with a double (tensorrt_double.py).
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
import onnx
import onnxruntime
import pytest
import tensorrt_double
import torch
import zoo

import onelora_compile as onelora
from onelora_compile.exporters import bundle, export_onnx
from onelora_compile.exporters.jetson.device.core.library import logger
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.adapter_file import read_adapter

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")

# The wheels on PyPI nearest to what each JetPack ships; 8.5 is on no public index.
WHEELS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16.1": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0": "tensorrt-cu12-bindings==11.4.0.106",
}


@pytest.fixture
def cudart(tmp_path):
    return cudart_double.compile_cudart(tmp_path)


def run(folder, *args):
    """The command line of a bundle in this process: exit code."""
    return bundles.device(folder).main([*map(str, args)])


def build(folder, *args):
    return run(folder, "--runtime", "tensorrt_rtx", "build", "--sm", "86", *args)


def plans(folder):
    return sorted((folder / "local" / "engines").glob("*.plan"))


# ---- NVIDIA's parser and builder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("jetpack", ["5.1", "6.2"])
@pytest.mark.parametrize("mode", ["fold", "load", "input", "bank"])
def test_nvidias_builder_takes_every_mode(mode, jetpack, tmp_path, capsys):
    folder = bundles.fresh(mode, tmp_path, jetpack)
    assert build(folder) == 0, capsys.readouterr().err
    (plan,) = plans(folder)
    record = json.loads(plan.with_suffix(".json").read_text())
    assert record["identity"]["sm"] == "8.6"
    before = plan.stat().st_mtime_ns
    assert build(folder) == 0
    assert plan.stat().st_mtime_ns == before  # it is there already
    assert build(folder, "--force") == 0
    assert plans(folder)[0].stat().st_mtime_ns != before


def test_load_builds_an_engine_for_each_adapter_with_its_weights(tmp_path):
    folder = bundles.fresh("load", tmp_path)
    model = onnx.load(folder / "model.onnx")
    assert build(folder) == 0
    assert run(folder, "--runtime", "tensorrt_rtx", "use", "b", "--sm", "86") == 0
    assert len(plans(folder)) == 2
    added = next(node for node in model.graph.node if node.op_type == "Add" and _vector_of(model, node))
    name, axis, weight = _vector_of(model, added)
    records = [json.loads(plan.with_suffix(".json").read_text())["identity"]["adapter"] for plan in plans(folder)]
    held = {entry["sha256"]: entry for entry in json.loads((folder / "manifest.json").read_text())["adapters"]}
    for plan, digest in zip(plans(folder), records, strict=True):
        vector = read_adapter(folder / held[digest]["file"]).vectors[name].numpy()
        folded = weight + np.expand_dims(vector, axis)
        other = next(entry for key, entry in held.items() if key not in (digest, ""))
        wrong = read_adapter(folder / other["file"]).vectors[name].numpy()
        content = plan.read_bytes()
        rows = [*folded, *folded.T]  # the builder may have transposed it
        assert any(np.ascontiguousarray(row).tobytes() in content for row in rows)
        rows = [*(weight + np.expand_dims(wrong, axis)), *(weight + np.expand_dims(wrong, axis)).T]
        assert not any(np.ascontiguousarray(row).tobytes() in content for row in rows)


def test_load_in_half_precision_leaves_neither_the_weight_nor_the_vector(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.TinyViT()), 0.3)
    export_onnx(model, (torch.randn(2, 16, 12),), tmp_path / "m.onnx", adapters="load", dtype=torch.float16)
    bundle(tmp_path / "m.onnx", tmp_path / "b")
    assert build(tmp_path / "b") == 0
    content = plans(tmp_path / "b")[0].read_bytes()
    weight = model.blocks[0].qkv.weight.detach().half()
    vector = onelora.vectors(model)["blocks.0.qkv"].detach()

    def held(matrix):
        return any(np.ascontiguousarray(row).tobytes() in content for row in [*matrix.numpy(), *matrix.numpy().T])

    assert held((weight.float() + vector[:, None]).half())
    assert not held(weight)
    assert vector.numpy().tobytes() not in content


def test_load_keeps_the_engines_in_use_and_before(tmp_path):
    folder = bundles.fresh("load", tmp_path)
    assert build(folder) == 0
    for name, count in (("a", 2), ("b", 2), ("a", 2), ("base", 2)):
        assert run(folder, "--runtime", "tensorrt_rtx", "use", name, "--sm", "86") == 0
        assert len(plans(folder)) == count
    times = {plan.name: plan.stat().st_mtime_ns for plan in plans(folder)}
    assert run(folder, "--runtime", "tensorrt_rtx", "rollback", "--sm", "86") == 0
    assert {plan.name: plan.stat().st_mtime_ns for plan in plans(folder)} == times  # nothing was built


def _vector_of(model, node):
    """(name of the vector, axis, weight) of an Add that folds one in, None of any other."""
    produced = {one.output[0]: one for one in model.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for wide, narrow in ((0, 1), (1, 0)):
        unsqueeze = produced.get(node.input[narrow])
        if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" and node.input[wide] in tensors:
            axis = int(onnx.numpy_helper.to_array(tensors[unsqueeze.input[1]])[0])
            return unsqueeze.input[0], axis, onnx.numpy_helper.to_array(tensors[node.input[wide]])
    return None


def test_refit_marks_every_vector_and_needs_a_gpu_to_build(tmp_path, capsys):
    # TensorRT-RTX compiles engines with refittable weights on a GPU only; that it got there means that it took the
    # names of the vectors, which is what can be known here.
    folder = bundles.fresh("refit", tmp_path)
    assert build(folder) == 1
    text = capsys.readouterr().err
    assert "CUDA_SUCCESS" in text
    assert "finds no weights" not in text
    network, _parser = _parsed(folder / "model.onnx")
    names = json.loads((folder / "manifest.json").read_text())["vectors"]
    assert all(network.mark_weights_refittable(name) for name in names)
    assert not network.mark_weights_refittable("no such name")


def _parsed(path):
    log = logger(rtx)
    network = rtx.Builder(log).create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(path))
    return network, parser  # whose memory the network's weights are


def test_an_input_model_keeps_its_vectors_as_inputs_of_the_network(tmp_path):
    # A default value would make each a constant, and every adapter would do nothing.
    folder = bundles.fresh("input", tmp_path)
    names = set(json.loads((folder / "manifest.json").read_text())["vectors"])
    network, _parser = _parsed(folder / "model.onnx")
    found = {network.get_input(index).name for index in range(network.num_inputs)}
    assert found == names | {"x"}
    original, _parser = _parsed(bundles.sources() / "input.onnx")
    assert original.num_inputs == 1  # the trap


def test_what_nvidia_refuses_is_explained(tmp_path, capsys):
    model = onelora.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    export_onnx(model, (torch.randn(2, 8),), tmp_path / "m.onnx", opset_version=18)
    bundle(tmp_path / "m.onnx", tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())

    broken = onnx.load(tmp_path / "b" / "model.onnx")
    broken.graph.node[0].op_type = "Nonsense"
    onnx.save(broken, tmp_path / "b" / "model.onnx")
    assert build(tmp_path / "b") == 1
    assert "the bundle is damaged, copy it again" in capsys.readouterr().err
    content = (tmp_path / "b" / "model.onnx").read_bytes()
    import hashlib

    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert build(tmp_path / "b") == 1
    text = capsys.readouterr().err
    assert "TensorRT can't read the model" in text
    assert "-> this TensorRT has no such operator" in text
    assert not plans(tmp_path / "b")


def test_a_bundle_for_another_release_says_so(tmp_path, capsys, monkeypatch, cudart):
    trt = tensorrt_double.module(rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    for version, said in (("10.3.0", False), ("8.5.2", True)):
        trt.__version__ = version
        assert run(bundles.fresh("fold", tmp_path / version), "--libcudart", cudart, "build") == 0
        assert ("made for TensorRT 10.3.0 (JetPack 6.2), here is 8.5.2" in capsys.readouterr().out) == said


def test_missing_profile_is_explained(tmp_path, capsys):
    folder = bundles.fresh("fold", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["build"]["profiles"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert build(folder) == 1
    assert "make the bundle again with shapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Target GPU SM 87 is not supported by this TensorRT release", "10.16.2 or newer"),
        ("Tactic Device request: 13089MB Available: 9185MB. Requested amount of GPU memory: OutOfMemory", "add swap"),
        ("Could not find any implementation for node {ForeignNode[a...b]}", "--optimization-level 1"),
        ("Serialization assertion stdVersionRead == kVERSION failed. Version tag does not match", "build it here"),
        ("CUDA initialization failure with error: 35", "--runtime nvidia"),
    ],
)
def test_known_messages(message, hint, tmp_path, capsys, monkeypatch, cudart):
    folder = bundles.fresh("fold", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx, build=message))
    assert run(folder, "--libcudart", cudart, "build") == 1
    text = capsys.readouterr().err
    assert message in text
    assert hint in text


# ---- behind the API, with a double ----------------------------------------------------------------------------------


def drive(folder, cudart, real, sources):
    """Everything that a user does on the device; returns the double."""
    trt = tensorrt_double.module(real)
    sys.modules["tensorrt"] = trt
    main = bundles.device(folder).main

    def call(*args, code=0):
        found = main(["--libcudart", str(cudart), *args])
        assert found == code, args

    mode = json.loads((folder / "manifest.json").read_text())["model"]["mode"]
    call("build")
    call("selftest")
    call("bench", "--runs", "3")
    call("bench", "--runs", "3", "--cuda-graph")
    if mode in ("input", "refit", "load"):
        call("update", str(sources / "new.safetensors"))
        call("selftest")
        call("use", "a")
        call("rollback")
        call("update", str(sources / "other.safetensors"), code=1)
    call("status")
    return trt


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


# ---- the bindings of every JetPack ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheels():
    """Folder of unpacked wheels, about 1 MB each, kept between runs."""
    return Path.home() / ".cache" / "onelora-compile-tests" / f"bindings-{sys.version_info[0]}{sys.version_info[1]}"


def fetched(wheels, version):
    """The folder of a wheel, with libraries that hold the symbols it asks for and do nothing."""
    place = wheels / version
    if (place / "ready").is_file():
        return place
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", "--target", place]
    subprocess.run([*pip, WHEELS[version]], check=True)
    (bound,) = place.glob("*/tensorrt.so")
    needed = subprocess.run(["readelf", "-d", bound], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", "-D", "--undefined-only", bound], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    own = [name for name in names if name.startswith(("createInfer", "createNv", "get", "initLib", "_ZN1"))]
    own = [name for name in own if name.isidentifier() and "@" not in name]
    (place / "stub.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in own))
    for line in needed.splitlines():
        if "libnv" in line:
            library = line.split("[")[1].rstrip("]")
            flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", "-o", place / library]
            subprocess.run(["cc", *flags, place / "stub.c"], check=True)
    (place / "ready").touch()
    return place


DRIVER = """
import sys
sys.path[:0] = {paths!r}
import tensorrt_bindings as real
from pathlib import Path
from test_jetson_tensorrt import drive
trt = drive(Path({folder!r}), Path({cudart!r}), real, Path({sources!r}))
print("calls", trt.__version__, " ".join(sorted(trt.calls)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
@pytest.mark.parametrize("mode", bundles.MODES)
def test_the_real_bindings_have_what_is_called(mode, version, tmp_path, wheels, cudart):
    place = fetched(wheels, version)
    folder = bundles.fresh(mode, tmp_path, "6.0" if version[0] == "8" and mode != "refit" else "6.2")
    here = Path(__file__).parent
    text = DRIVER.format(
        paths=[str(place), str(here), str(here.parent)],
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


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return zoo.logits(self.model(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_nvidias_builder_takes_real_architectures(name, dtype, tmp_path):
    model, inputs = zoo.MODELS[name]()
    fill_vectors(onelora.adapt(model), 0.05)
    for mode in ("fold", "load", "input"):
        export_onnx(Logits(model), (), tmp_path / "m.onnx", kwargs=inputs, adapters=mode, dtype=dtype)
        for jetpack in ("5.1", "6.2"):
            report = bundle(tmp_path / "m.onnx", tmp_path / f"{mode}-{jetpack}", jetpack=jetpack)
            assert all(check.passed for check in report.checks)
            assert build(tmp_path / f"{mode}-{jetpack}") == 0
