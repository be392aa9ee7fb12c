"""adapt follows code, and what that does to files, processes and settings is not done, or put back."""

import array
import gc
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora

LOCAL, OPEN = threading.local(), open


class Acting(nn.Module):
    """Does something to the world, then reads a weight."""

    def __init__(self, act, folder):
        super().__init__()
        self.child, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.act, self.folder, self.array = act, folder, array.array("i", [1])

    def forward(self, x):
        self.act(self, self.folder)
        return F.linear(self.child(x), self.weight)


def log(m, folder):
    with open(folder / "log.txt", "a") as file:
        file.write("a line\n")
        print("another", file=file)


def log_bytes(m, folder):
    with (folder / "kept.txt").open("wb") as file:
        file.write(b"1")
    (folder / "new.txt").write_text("text")


def remove(m, folder):
    while os.path.exists(folder / "kept.txt"):
        os.remove(folder / "kept.txt")


def remove_once(m, folder):
    os.remove(folder / "kept.txt")
    (folder / "kept.txt").unlink(missing_ok=True)


def folders(m, folder):
    os.makedirs(folder / "a" / "b")
    (folder / "c").mkdir()


def save(m, folder):
    torch.save(torch.ones(1), folder / "t.pt")
    numpy.save(folder / "t.npy", [1])


DROPPED = {
    "log": log,
    "log_bytes": log_bytes,
    "remove": remove_once,
    "tree": lambda m, folder: shutil.rmtree(folder / "full"),
    "folders": folders,
    "rename": lambda m, folder: os.replace(folder / "kept.txt", folder / "other.txt"),
    "save": save,
}
REFUSED = {
    "wait": remove,
    "descriptor": lambda m, folder: os.open(folder / "new.txt", os.O_CREAT | os.O_WRONLY),
    "process": lambda m, folder: subprocess.run([sys.executable, "-c", f"open({str(folder / 'p')!r}, 'w')"]),
    "shell": lambda m, folder: os.system(f"touch {folder / 'p'}"),
    "exit": lambda m, folder: os._exit(1),
    "connection": lambda m, folder: socket.socket(),
}


def content(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in pathlib.Path(folder).rglob("*")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "one.txt").write_text("one")
    return tmp_path


@pytest.mark.parametrize("name", DROPPED)
def test_files_are_left_alone_and_the_code_is_followed_to_its_end(name, folder):
    model, before = Acting(DROPPED[name], folder), content(folder)
    assert list(onelora.vectors(onelora.adapt(model))) == ["", "child"]
    assert content(folder) == before
    model(torch.ones(2, 4))  # which does it
    assert content(folder) != before


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_something_back_ends_the_way_there(name, folder):
    model, before = Acting(REFUSED[name], folder), content(folder)
    assert list(onelora.vectors(onelora.adapt(model))) == ["child"]
    assert "can't be followed" in onelora.summary(model).skipped[""]
    assert content(folder) == before


FLAGS = {
    "threads": (lambda: torch.set_num_threads(3), torch.get_num_threads),
    "cudnn": (lambda: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "device": (
        lambda: torch.set_default_device("meta"),
        lambda: getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
    ),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "printing": (lambda: torch.set_printoptions(precision=9), lambda: torch._tensor_str.PRINT_OPTS.precision),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "path": (lambda: sys.path.append("more"), lambda: list(sys.path)),
    "recursion": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "garbage": (gc.disable, gc.isenabled),
    "numpy": (lambda: numpy.seterr(all="ignore"), numpy.geterr),
    "local": (lambda: setattr(LOCAL, "calls", LOCAL.calls + 1), lambda: LOCAL.calls),
}


@pytest.mark.parametrize("name", FLAGS)
def test_settings_are_as_they_were(name, tmp_path, monkeypatch):
    act, read = FLAGS[name]
    LOCAL.calls = 0
    monkeypatch.chdir(tmp_path)
    model, before = Acting(lambda m, folder: act(), tmp_path), read()
    assert list(onelora.vectors(onelora.adapt(model))) == ["", "child"]
    assert read() == before


def test_an_array_is_as_it_was(tmp_path):
    model = Acting(lambda m, folder: m.array.append(2), tmp_path)
    onelora.adapt(model)
    assert model.array == array.array("i", [1])


def test_other_threads_write_and_start_what_they_want(tmp_path):
    go, done = threading.Event(), threading.Event()

    def work():
        go.wait(60)
        (tmp_path / "a").mkdir()
        with open(tmp_path / "a" / "log.txt", "w") as file:
            file.write("line")
        os.replace(tmp_path / "a" / "log.txt", tmp_path / "log.txt")
        torch.save(torch.ones(1), tmp_path / "t.pt")
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        socket.socket().close()
        done.set()

    def meet(m, folder):
        go.set()
        assert done.wait(60)
        open(folder / "mine.txt", "w").close()

    thread = threading.Thread(target=work)
    thread.start()
    model = onelora.adapt(Acting(meet, tmp_path))
    thread.join()
    assert list(onelora.vectors(model)) == ["", "child"]
    assert content(tmp_path).keys() == {str(tmp_path / name) for name in ("a", "log.txt", "t.pt")}
    assert content(tmp_path)[str(tmp_path / "log.txt")] == b"line"
    assert open is OPEN
