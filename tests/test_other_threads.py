"""What the code of a model is followed with is seen by nobody else: other threads, imports, tables of PyTorch."""

import gc
import importlib
import sys
import threading
import weakref
from typing import Any

import torch
import transformers
from torch import nn

import onelora_compile as onelora
from onelora_compile.looking.one_at_a_time import seen_here, silent

TORCH: Any = torch
NAMES = ("ones", "zeros", "empty", "rand", "randn", "finfo", "iinfo")
OWN = {name: getattr(torch, name) for name in NAMES}


def test_another_thread_has_the_functions_of_torch_while_a_model_is_adapted():
    found: list[str] = []
    done = threading.Event()

    def serve():
        while not done.is_set():
            found.extend(name for name in NAMES if getattr(torch, name) is not OWN[name])

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    models = [transformers.LlamaForCausalLM(config) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for model in models:
            onelora.adapt(model)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert found == []
    assert type(torch) is type(sys)


def test_what_a_forward_imports_keeps_the_functions_of_torch(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("import torch\nfrom torch import finfo, ones\nSMALL = torch.finfo\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            late = importlib.import_module("imported_late")
            return self.fc(x) @ self.scale.T + late.ones(4) * torch.finfo(x.dtype).eps

    onelora.adapt(Late())
    late = sys.modules.pop("imported_late")
    assert (late.finfo, late.ones, late.SMALL) == (OWN["finfo"], OWN["ones"], OWN["finfo"])


def test_tables_that_torch_keeps_of_its_functions_hold_its_own():
    from torch.utils import _device

    _device._device_constructors.cache_clear()
    with seen_here(torch, {"ones": print, "finfo": print}):
        assert TORCH.ones is print
        assert OWN["ones"] in _device._device_constructors()
    assert TORCH.ones is OWN["ones"]


def test_what_is_assigned_meanwhile_stays(monkeypatch):
    monkeypatch.setattr(torch, "finfo", OWN["finfo"])  # put back behind the test
    with seen_here(torch, {"finfo": print}):
        TORCH.finfo = max
    assert TORCH.finfo is max


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.second(self.first(x).relu()) * self.scale


def test_another_thread_calls_a_compiled_model_while_one_is_adapted():
    """torch.fx marks the whole process as tracing, and what is compiled refuses to run then."""
    served, x = Scaled(), torch.randn(2, 8)
    failed: list[Exception] = []
    done = threading.Event()
    fast = torch.compile(served, backend="eager")
    expected = fast(x)

    def serve():
        while not done.is_set():
            try:
                assert torch.equal(fast(x), expected)
            except Exception as error:
                failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(20):
            onelora.adapt(Scaled())
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert failed == []


def test_other_threads_neither_see_nor_keep_what_adapt_changes(capsys):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.ws = nn.ParameterList(torch.randn(8, 8) for _ in range(4))
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            for w in self.ws:
                x = torch.tanh(x @ w)
            return self.a(x)

    def patches():
        return nn.Module.__call__, nn.Module.__getattr__, nn.Module.get_parameter, sys.stdout, sys.stderr

    before, found, wrong, done = patches(), [], [], threading.Event()
    served, x = Many(), torch.randn(2, 8)
    expected = served(x)

    def adapts():
        for _ in range(5):
            found.append(len(onelora.vectors(onelora.adapt(nn.Sequential(Many(), Many())))))

    def serves():
        while not done.is_set():
            wrong.extend([0] * (not torch.equal(served(x), expected)))
            print("served")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=adapts) for _ in range(4)]
        beside = threading.Thread(target=serves)
        for thread in (beside, *threads):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        beside.join()
        sys.setswitchinterval(interval)
    assert found == [10] * 20
    assert wrong == []
    assert patches() == before
    assert set(capsys.readouterr().out.split()) == {"served"}


def test_what_stands_for_a_stream_outlives_its_block():
    """`print` holds no reference to what it writes to: another thread's would write to what is gone, and crash."""
    with silent("stdout"):
        inside = weakref.ref(sys.stdout)
    gc.collect()
    assert inside() is not None
    with silent("stdout"):
        assert sys.stdout is inside()
