"""EngineRunner and refit_engine: on a double of TensorRT here, on engines themselves where there is a GPU."""

import base64
import json
import sys

import cudart_double
import engines
import numpy as np
import onnx
import onnx_ir
import pytest
import tensorrt_double
import torch
from engines import RTX
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import EngineRunner, OnnxRunner, build_engine, refit_engine
from onelora_compile.exporters.tensorrt import library, runner
from onelora_compile.exporters.tensorrt.gpu_memory import CudaMemory, TorchMemory
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.testing import fill_vectors

tensorrt_rtx_bindings = pytest.importorskip("tensorrt_rtx_bindings")

# ONNX Runtime in the place of the engine: what is fed, where it lies and what is read, on the CPU.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with an engine of each mode that ONNX Runtime computes on the memory of the CPU."""

    class Memory(TorchMemory):
        def target(self):
            return "sm_86"

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(tensorrt_rtx_bindings, stream=0))
    monkeypatch.setattr(library, "_api", library._api.__wrapped__)
    monkeypatch.setattr(runner, "device_memory", lambda which: Memory(torch.device("cpu")))
    torch.manual_seed(0)
    other = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(64, 48))), 0.3, seed=9)
    onelora.save_adapter(other, tmp_path / "other.safetensors")
    for mode in ("fold", "input", "bank", "refit"):
        path, _ = engines.linear(tmp_path, "input" if mode == "refit" else mode)
        build_engine(path, tmp_path / f"{mode}.engine", adapters=mode, **RTX | {"flavour": "tensorrt"})
    return tmp_path


def addresses(runner):
    return dict(runner._context.context._double.addresses)


def vector_in(plan):
    """The vector of a plan of the double."""
    model = onnx.load_model_from_string(base64.b64decode(json.loads(plan)["model"]))
    return next(onnx.numpy_helper.to_array(one) for one in model.graph.initializer if one.name == "0")


@pytest.mark.parametrize("mode", ["fold", "input", "bank", "refit"])
def test_a_runner_feeds_and_reads(mode, stand_in):
    reference = OnnxRunner(stand_in / f"linear-{'input' if mode == 'refit' else mode}.onnx")
    runner = EngineRunner(stand_in / f"{mode}.engine")
    assert runner.input_names == ["input"]
    for batch in (4, 1, 8, 8, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 64)).astype(np.float16)
        (got,), (expected,) = runner.run([x]), reference.run([x])
        assert got.dtype == np.float16
        assert np.array_equal(got, expected)
        (tensor,) = runner.run({"input": torch.from_numpy(x)})
        assert torch.equal(tensor, torch.from_numpy(expected))
    with pytest.raises(onelora.ExportError, match=r"'input' of \[9, 64\] is not in its profile"):
        runner.run([np.zeros((9, 64), np.float16)])


def test_a_runner_without_pytorchs_memory(stand_in, monkeypatch):
    class Memory(CudaMemory):
        def target(self):
            assert super().target() == "sm_87"  # of cudart_double.py
            return "sm_86"

    library = cudart_double.compile_cudart(stand_in)
    monkeypatch.setattr(runner, "device_memory", lambda which: Memory(str(library)))
    monkeypatch.setitem(sys.modules["tensorrt"].faults, "stream", 7)
    reference = OnnxRunner(stand_in / "linear-input.onnx", stand_in / "other.safetensors")
    running = EngineRunner(stand_in / "input.engine", stand_in / "other.safetensors", memory="cuda")
    for batch in (4, 8, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 64)).astype(np.float16)
        assert np.array_equal(running.run([x])[0], reference.run([x])[0])
        assert torch.equal(running.run([torch.from_numpy(x)])[0], torch.from_numpy(reference.run([x])[0]))


@pytest.mark.parametrize("mode", ["input", "refit"])
def test_a_runner_swaps(mode, stand_in):
    reference = OnnxRunner(stand_in / "linear-input.onnx")
    runner = EngineRunner(stand_in / f"{mode}.engine")
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float16)
    before, seen = None, []
    for adapter in (None, stand_in / "other.safetensors", None, stand_in / "other.safetensors"):
        runner.use(adapter)
        reference.use(adapter)
        (got,), (expected,) = runner.run([x]), reference.run([x])
        assert np.array_equal(got, expected)
        assert before in (None, addresses(runner))  # what a CUDA graph has captured stays where it is
        before = addresses(runner)
        seen.append(got)
    assert not np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])
    # What a graph replays: the same launch, the new vectors.
    runner.use(None)
    runner.launch()
    raw = runner._memory.download(runner._buffer(runner.output_names[0], 0), seen[0].nbytes)
    assert np.array_equal(raw.view(torch.float16).reshape(seen[0].shape).numpy(), seen[0])


def test_contexts_with_adapters_of_their_own(stand_in):
    runner = EngineRunner(stand_in / "input.engine")
    second = runner.with_adapter(stand_in / "other.safetensors")
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float16)
    first = runner.run([x])[0]
    assert not np.array_equal(second.run([x])[0], first)
    assert np.array_equal(runner.run([x])[0], first)
    assert second.engine is runner.engine
    assert not set(addresses(runner).values()) & set(addresses(second).values())

    bank = EngineRunner(stand_in / "bank.engine", "linear")
    base = bank.with_adapter(None)
    rows = bank.run([x], adapter_ids=[0, -1, -1, 0])[0]
    assert np.array_equal(rows[[0, 3]], bank.run([x])[0][[0, 3]])
    assert np.array_equal(rows[[1, 2]], base.run([x])[0][[1, 2]])

    refitted = EngineRunner(stand_in / "refit.engine")
    other = refitted.with_adapter(None)
    with pytest.raises(onelora.StateError, match=r"2 runners share .* use one runner, or an engine of mode 'input'"):
        refitted.use(stand_in / "other.safetensors")
    with pytest.raises(onelora.StateError, match="one adapter for all its contexts"):
        refitted.with_adapter(stand_in / "other.safetensors")
    del other
    refitted.use(stand_in / "other.safetensors")
    with pytest.raises(onelora.StateError, match="are in its weights"):
        EngineRunner(stand_in / "fold.engine").use(stand_in / "other.safetensors")
    with pytest.raises(onelora.StateError, match="is no bank"):
        runner.use(0)


def test_a_timing_cache_is_written_back(stand_in):
    """Also by a build that failed; one of another device is begun anew, and said."""
    cache, onnx_path = stand_in / "cache", stand_in / "linear-fold.onnx"
    options = RTX | {"flavour": "tensorrt", "timing_cache": cache}
    report = build_engine(onnx_path, stand_in / "m.engine", **options)
    assert report.manifest.flags["timing_cache"] == str(cache)
    assert cache.read_bytes() == b"."
    sys.modules["tensorrt"].faults["build"] = "broken"
    with pytest.raises(onelora.ExportError, match=r"can't be built into an engine: TensorRT .* says: broken"):
        build_engine(onnx_path, stand_in / "m.engine", **options)
    assert cache.read_bytes() == b".."
    del sys.modules["tensorrt"].faults["build"]
    cache.write_bytes(b"damaged")
    report = build_engine(onnx_path, stand_in / "m.engine", **options)
    assert "another device or version" in str(report.notes)
    assert cache.read_bytes() == b"."


def test_an_engine_for_another_gpu(stand_in, monkeypatch):
    memory = TorchMemory(torch.device("cpu"))
    monkeypatch.setattr(memory, "target", lambda: "sm_120")
    monkeypatch.setattr(runner, "device_memory", lambda which: memory)
    with pytest.raises(onelora.StateError, match="it was built for sm_86, this GPU is sm_120"):
        EngineRunner(stand_in / "fold.engine")


@pytest.mark.parametrize("out", [None, "new.engine"])
def test_a_refitted_file(out, stand_in):
    source = stand_in / "refit.engine"
    target = stand_in / out if out else source
    before = source.read_bytes()
    report = refit_engine(source, stand_in / "other.safetensors", None if out is None else target)
    assert (report.vectors, report.bytes, report.base_weights) == (1, 192, [])
    assert "vectors set" in str(report)
    assert (source.read_bytes() == before) == (out is not None)
    found = Manifest.read(target)
    found.check_file(target)
    assert found.adapter == "other"
    vector = onelora.read_adapter(stand_in / "other.safetensors").vectors["0"]
    assert np.array_equal(vector_in(target.read_bytes()), vector.numpy())  # absolute values
    assert torch.equal(found.initial_adapter(target).vectors["0"], vector)
    reference = OnnxRunner(stand_in / "linear-input.onnx", stand_in / "other.safetensors")
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float16)
    assert np.array_equal(EngineRunner(target).run([x])[0], reference.run([x])[0])


def test_weights_that_were_merged_with_a_vector(stand_in):
    """TensorRT may ask for weights that it merged with ours: they get the base's values, or it is an error."""
    model = onnx_ir.load(stand_in / "linear-input.onnx")
    other = next(name for name, value in model.graph.initializers.items() if value.dtype == onnx_ir.DataType.FLOAT16)
    sys.modules["tensorrt"].faults["missing"] = other
    before = (stand_in / "refit.engine").read_bytes()
    with pytest.raises(onelora.ExportError, match=rf"merged vectors with other weights, {other}, .* give onnx="):
        refit_engine(stand_in / "refit.engine", stand_in / "other.safetensors")
    with pytest.raises(onelora.ExportError, match="is not the model that"):
        refit_engine(stand_in / "refit.engine", stand_in / "other.safetensors", onnx=stand_in / "linear-fold.onnx")
    sys.modules["tensorrt"].faults["missing"] = "unknown"
    with pytest.raises(onelora.ExportError, match="has no weights unknown"):
        refit_engine(stand_in / "refit.engine", stand_in / "other.safetensors", onnx=stand_in / "linear-input.onnx")
    assert (stand_in / "refit.engine").read_bytes() == before
    sys.modules["tensorrt"].faults["missing"] = other
    report = refit_engine(
        stand_in / "refit.engine", stand_in / "other.safetensors", onnx=stand_in / "linear-input.onnx"
    )
    assert report.base_weights == [other]
    assert "set to the base's values" in str(report)


# With a GPU: engines against ONNX Runtime on the CPU.


def here():
    major, minor = torch.cuda.get_device_capability()
    return {"progress": False, "shapes": {"batch": (1, 4, 8)}, "target": f"sm_{major}{minor}"}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fold", "load", "input", "bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_engines_compute_what_onnx_runtime_does(mode, dtype, tmp_path):
    path, _ = engines.exported("hf_vit", mode, dtype, tmp_path)
    build_engine(path, tmp_path / "m.engine", **here())
    runner, reference = EngineRunner(tmp_path / "m.engine"), OnnxRunner(path)
    for batch in (1, 4, 8, 4):
        x = torch.randn(batch, 3, 16, 16, dtype=dtype)
        (got,), (expected,) = runner.run([x.numpy()]), reference.run([x.numpy()])
        bound = (1e-3 if dtype == torch.float32 else 1e-2) * np.abs(expected).max()  # TF32 has ten bits
        assert np.abs(got.astype(np.float32) - expected.astype(np.float32)).max() <= bound
        (tensor,) = runner.run([x.cuda()])
        assert tensor.is_cuda
        assert np.array_equal(tensor.cpu().numpy(), got)


def swapped(tmp_path, mode, dtype=torch.float16):
    path, model = engines.exported("hf_vit", "input", dtype, tmp_path)
    build_engine(path, tmp_path / "m.engine", adapters=mode, **here())
    fill_vectors(model, 0.05, seed=3)
    onelora.save_adapter(model, tmp_path / "b.safetensors")
    return OnnxRunner(path)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["input", "refit"])
def test_adapters_are_swapped_and_back(mode, tmp_path):
    reference = swapped(tmp_path, mode)
    runner = EngineRunner(tmp_path / "m.engine")
    x = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float16)
    for adapter in (None, tmp_path / "b.safetensors", None, tmp_path / "b.safetensors"):
        runner.use(adapter)
        reference.use(adapter)
        (got,), (expected,) = runner.run([x]), reference.run([x])
        assert np.abs(got.astype(np.float32) - expected.astype(np.float32)).max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.gpu
def test_refit_of_the_file(tmp_path):
    reference = swapped(tmp_path, "refit")
    report = refit_engine(tmp_path / "m.engine", tmp_path / "b.safetensors", tmp_path / "b.engine")
    assert report.vectors == 12
    x = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float16)
    for engine, adapter in (("m.engine", None), ("b.engine", tmp_path / "b.safetensors")):
        reference.use(adapter)
        (got,), (expected,) = EngineRunner(tmp_path / engine).run([x]), reference.run([x])
        assert np.abs(got.astype(np.float32) - expected.astype(np.float32)).max() <= 1e-2 * np.abs(expected).max()
    refit_engine(tmp_path / "b.engine", tmp_path / "m.engine.safetensors")  # and back, in place
    reference.use(None)
    (got,), (expected,) = EngineRunner(tmp_path / "b.engine").run([x]), reference.run([x])
    assert np.abs(got.astype(np.float32) - expected.astype(np.float32)).max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.gpu
def test_two_contexts_and_a_cuda_graph(tmp_path):
    reference = swapped(tmp_path, "input")
    runner = EngineRunner(tmp_path / "m.engine")
    second = runner.with_adapter(tmp_path / "b.safetensors")
    x = torch.randn(4, 3, 16, 16, dtype=torch.float16)
    first = runner.run([x])[0]
    other = second.run([x])[0]
    assert not torch.equal(first, other)
    assert torch.equal(runner.run([x])[0], first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.launch(torch.cuda.current_stream().cuda_stream)
    runner.use(tmp_path / "b.safetensors")
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    replayed = runner._memory.download(runner._buffer(runner.output_names[0], 0), first.numel() * 2)
    replayed = replayed.view(torch.float16).reshape(first.shape).cpu()
    reference.use(tmp_path / "b.safetensors")
    expected = torch.from_numpy(reference.run([x.numpy()])[0])
    assert (replayed.float() - expected.float()).abs().max() <= 1e-2 * expected.abs().max()
