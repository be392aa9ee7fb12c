"""What a call of an engine feeds, and the memory that it lies in: no engine runs here."""

import engines
import numpy as np
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters.jetson.device.core.messages import EngineError
from onelora_compile.exporters.tensorrt.feed import TORCH_DTYPES, adapter_id, feed_of, offsets_of, vectors_to_feed
from onelora_compile.exporters.tensorrt.gpu_memory import ALIGNMENT, CudaMemory, TorchMemory
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.testing import fill_vectors

tensorrt_rtx_bindings = pytest.importorskip("tensorrt_rtx_bindings")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = engines.build_modes(tmp_path_factory.mktemp("built"))
    torch.manual_seed(0)
    other = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(64, 48))), 0.3, seed=9)
    onelora.save_adapter(other, folder / "other.safetensors")
    return folder


def manifest(folder, mode):
    return Manifest.read(folder / f"{mode}.engine")


def test_vectors_lie_aligned_in_one_buffer(built):
    from dataclasses import replace

    found = replace(manifest(built, "input"), vectors={"a": (48,), "b": (65,), "c": (2, 3)})
    offsets, size = offsets_of(found)
    assert offsets == {"a": 0, "b": 256, "c": 768}
    assert size == 1024
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert offsets_of(manifest(built, "fold")) == ({}, 0)


def test_memory_is_overwritten_in_place():
    memory = TorchMemory(torch.device("cpu"))
    buffer = memory.allocate(1024)
    before = memory.address(buffer)
    first, second = np.arange(48, dtype=np.float32), torch.arange(65).half()
    memory.upload(buffer, 0, first)
    memory.upload(buffer, 256, second)
    assert memory.address(buffer) == before
    raw = memory.download(buffer, 1024)
    assert torch.equal(raw[:192].view(torch.float32), torch.from_numpy(first))
    assert torch.equal(raw[256 : 256 + 130].view(torch.float16), second)
    memory.upload(buffer, 0, np.asfortranarray(np.arange(12.0).reshape(3, 4)))
    assert memory.download(buffer, 96).view(torch.float64).tolist() == list(range(12))
    memory.upload(buffer, 0, torch.arange(12.0).reshape(3, 4).T)
    assert (
        memory.download(buffer, 48).view(torch.float32).tolist()
        == torch.arange(12.0).reshape(3, 4).T.flatten().tolist()
    )


def test_the_vectors_that_are_fed(built):
    engine = built / "input.engine"
    found = manifest(built, "input")
    start = vectors_to_feed(found, engine, None)["0"]
    other = vectors_to_feed(found, engine, built / "other.safetensors")["0"]
    assert start.dtype == other.dtype == np.float32
    assert np.array_equal(start, onelora.read_adapter(built / "input.engine.safetensors").vectors["0"])
    assert np.array_equal(other, onelora.read_adapter(built / "other.safetensors").vectors["0"])
    assert not np.array_equal(start, other)
    with pytest.raises(onelora.StateError, match=r"are in its weights \(mode 'fold'\)"):
        vectors_to_feed(manifest(built, "fold"), built / "fold.engine", built / "other.safetensors")


def test_start_vectors_that_were_not_copied(built, tmp_path):
    with pytest.raises(onelora.ExportError, match=r"input\.engine\.safetensors, the vectors that .* is missing"):
        vectors_to_feed(manifest(built, "input"), tmp_path / "input.engine", None)


def test_start_vectors_of_another_build(built, tmp_path):
    found = manifest(built, "input")
    (tmp_path / "input.engine.safetensors").write_bytes((built / "other.safetensors").read_bytes())
    with pytest.raises(onelora.ExportError, match="does not hold the vectors that"):
        vectors_to_feed(found, tmp_path / "input.engine", None)


def test_ids_of_a_bank(built):
    engine, found = built / "bank.engine", manifest(built, "bank")
    assert [adapter_id(found, engine, one) for one in (None, "linear", built / "linear.safetensors", 0, -1)] == [
        -1,
        0,
        0,
        0,
        -1,
    ]
    for wrong in ("two", 1, -2):
        with pytest.raises(onelora.ExportError, match=r"has no adapter 'two'; it has linear|has adapters 0 to 0"):
            adapter_id(found, engine, wrong)
    x = np.zeros((3, 64), np.float16)
    # -1 is the zero row, which is the last: TensorRT's Gather need not count from the end.
    assert feed_of(found, engine, ["input"], [x], [0, -1, 0], -1)["adapter_ids"].tolist() == [0, 1, 0]
    assert feed_of(found, engine, ["input"], {"input": x}, None, 0)["adapter_ids"].tolist() == [0, 0, 0]
    for ids in ([0], [0.9, 0, 0]):
        with pytest.raises(onelora.ExportError, match=r"are not one for each of the 3 rows|are not whole numbers"):
            feed_of(found, engine, ["input"], [x], ids, -1)  # type: ignore[arg-type]
    with pytest.raises(onelora.ExportError, match=r"not all between -1 \(the base\) and 0"):
        feed_of(found, engine, ["input"], [x], [1, 0, 0], -1)


@pytest.mark.parametrize(
    ("inputs", "ids", "error", "match"),
    [
        ([], None, onelora.ExportError, r"takes 1 inputs \['input'\]; 0 were given"),
        ({"x": 0}, None, onelora.ExportError, r"takes the inputs input; given were x"),
        ([np.zeros((1, 64), np.float32)], None, onelora.ExportError, r"'input' is torch.float16, float32 was given"),
        ([torch.zeros(1, 64).bfloat16()], None, onelora.ExportError, r"'input' is torch.float16, bfloat16 was given"),
        ([np.zeros((1, 64), np.float16)], [0], onelora.StateError, r"is no bank \(its mode is 'fold'\)"),
    ],
)
def test_inputs_that_do_not_fit(inputs, ids, error, match, built):
    with pytest.raises(error, match=match):
        feed_of(manifest(built, "fold"), built / "fold.engine", ["input"], inputs, ids, -1)


def test_every_dtype_of_a_graph_has_a_torch_dtype():
    packed = {"FP8", "INT4", "FP4", "E8M0"}  # not of inputs and outputs that torch has
    assert set(tensorrt_rtx_bindings.DataType.__members__) - packed == set(TORCH_DTYPES)


def test_the_cuda_runtime_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((EngineError, onelora.ExportError), match=r"libcudart|CUDA"):
        CudaMemory()
