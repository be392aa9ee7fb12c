"""What a model with several adapters holds stays exact, whatever is done to the model and in whatever dtype."""

import copy
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from row_models import with_adapters
from torch.nn.parallel import DistributedDataParallel

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def values(model):
    return torch.cat([vector.detach().flatten() for vector in onelora.vectors(model).values()])


def test_a_model_that_became_float64_loses_no_digit_by_a_switch():
    model, _ = with_adapters(zoo.MLP(), 2)
    model.double()
    with torch.no_grad():
        for vector in onelora.vectors(model).values():
            vector.add_(1 / 3)
    before = values(model)
    for name in "10":
        onelora.set_adapter(model, name)
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_come_and_go_without_a_trace(dtype, tmp_path):
    """Also of vectors that training left as they are, where it changed others."""
    model = fill_vectors(onelora.adapt(zoo.MLP(), onelora.OneLoRAConfig(vector_dtype=dtype), adapter_name="0"), 0.5)
    before = {name: vector.clone() for name, vector in onelora.vectors(model).items()}
    for scale in (0.37, -1.7, 0.0, 1 / 3):
        onelora.set_adapter(model, "0", scale=scale)
        for name, vector in onelora.vectors(model).items():
            torch.testing.assert_close(vector.double(), (before[name].double() * scale).to(dtype).double())
        onelora.save_adapter(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        onelora.vectors(model)["b"].add_(1.0)
    onelora.set_adapter(model, "0")
    after = onelora.vectors(model)
    assert all(torch.equal(after[name], before[name]) for name in ("a", "c"))
    torch.testing.assert_close(after["b"], before["b"] + 3.0, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", [None, "0"])
def test_a_file_that_is_loaded_into_a_scaled_adapter_is_not_scaled(several, name, tmp_path):
    half: Any = np.float32(0.5)
    model = fill_vectors(onelora.adapt(zoo.MLP(), adapter_name="0"), 0.5)
    if several:
        onelora.add_adapter(model, "1")
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    before = values(model)
    onelora.set_adapter(model, "0", scale=half)
    assert torch.equal(values(model), before / 2)
    onelora.load_adapter(model, tmp_path / "a.safetensors", adapter_name=name)
    assert torch.equal(values(model), before)


def test_adapters_are_listed_while_others_come():
    model, _ = with_adapters(zoo.MLP(), 2)
    over, failed = threading.Event(), []

    def look():
        try:
            while not over.is_set():
                onelora.adapters(model)
        except Exception as error:
            failed.append(error)

    thread, interval = threading.Thread(target=look), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for number in range(2, 200):
            onelora.add_adapter(model, str(number))
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failed, failed[0]


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1, -1, 0]),
        [np.int64(1), np.int32(-1), 0],
        torch.tensor([1, -1, 0], dtype=torch.int8),
        np.array(["1", "0", "0"]),
        range(1, -2, -1),
    ],
)
def test_ids_of_numpy(ids):
    model, _ = with_adapters(zoo.MLP(), 2, scale=0.5)
    x = torch.randn(3, 8)
    named = [None if int(one) == -1 else str(int(one)) for one in ids]
    with onelora.rows(model, named):
        expected = model(x)
    with onelora.rows(model, ids):
        assert torch.equal(model(x), expected)


def test_a_batch_of_no_rows():
    model, _ = with_adapters(zoo.MLP(), 2)
    with onelora.rows(model, []):
        assert model(torch.randn(0, 8)).shape == (0, 7)


def test_names_that_are_none():
    model, _ = with_adapters(zoo.MLP(), 2)
    wrong: list[Any] = [["1"], None, 1]
    for name in wrong:
        with pytest.raises(onelora.StateError, match="there is no adapter"):
            onelora.set_adapter(model, name)
        with pytest.raises(onelora.ConfigError, match="is a string"):
            onelora.adapt(zoo.MLP(), adapter_name=name)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_what_distributed_data_parallel_would_not_reduce_is_refused(tmp_path):
    torch.manual_seed(0)
    base = zoo.MLP()
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules=["a"]))
    onelora.save_adapter(onelora.adapt(base), tmp_path / "all.safetensors")
    wrapped = DistributedDataParallel(model)
    onelora.add_adapter(wrapped, "same")
    before = set(model.state_dict())
    for one in (wrapped, torch.compile(wrapped)):
        for call in (
            lambda one=one: onelora.add_adapter(one, "more", onelora.OneLoRAConfig(target_modules=["a", "b"])),
            lambda one=one: onelora.add_adapter(
                one, "head", onelora.OneLoRAConfig(target_modules=["a"], modules_to_save=["c"])
            ),
            lambda one=one: onelora.load_adapter(one, tmp_path / "all.safetensors", adapter_name="all"),
            lambda one=one: onelora.row_parameters(one),
        ):
            with pytest.raises(onelora.StateError, match="DistributedDataParallel"):
                call()
    assert set(onelora.adapters(model)) == {"default", "same"}
    assert set(model.state_dict()) == before
    with onelora.rows(wrapped, ["same", "default"]):
        wrapped(torch.randn(2, 8)).sum().backward()
    onelora.row_parameters(model)
    with pytest.raises(onelora.StateError, match="DistributedDataParallel"), onelora.rows(wrapped, ["same"]):
        pass
    with torch.no_grad(), onelora.rows(wrapped, ["same"]):
        wrapped(torch.randn(1, 8))


WAYS = {
    "adapt": lambda model, path: onelora.adapt(DistributedDataParallel(model)),
    "adapt_compiled": lambda model, path: onelora.adapt(compiled_in_place(DistributedDataParallel(model))),
    "adapt_around": lambda model, path: onelora.adapt(torch.nn.Sequential(DistributedDataParallel(model))),
    "load": lambda model, path: onelora.load_adapter(DistributedDataParallel(model), path),
    "one_line": lambda model, path: called(torch.compile(DistributedDataParallel(model), **ONE_LINE)),
    "one_line_inside": lambda model, path: called(DistributedDataParallel(torch.compile(model, **ONE_LINE))),
    "one_line_in_place": lambda model, path: called(DistributedDataParallel(compiled_in_place(model))),
}
ONE_LINE: dict[str, Any] = {"backend": "onelora", "options": {"inner": "eager"}}


def called(model):
    return model(torch.randn(2, 8))


def compiled_in_place(model):
    model.compile(**ONE_LINE)
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", WAYS)
def test_vectors_that_come_after_distributed_data_parallel_are_refused(way, tmp_path):
    """It reduces what it was built with: the vectors of each process would go their own way, without a word."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = zoo.MLP()
    onelora.save_adapter(onelora.adapt(copy.deepcopy(model)), tmp_path / "a.safetensors")
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(onelora.StateError, match="inside DistributedDataParallel"):
        WAYS[way](model, tmp_path / "a.safetensors")
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    onelora.adapt(model)  # and may still be, first
    ddp = DistributedDataParallel(model)
    called(torch.compile(ddp, **ONE_LINE)).sum().backward()
    assert all(vector.grad is not None for vector in onelora.vectors(ddp).values())
