"""The example server as a command: `python -m onelora_compile.examples.serving`."""

import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from served import World

import onelora_compile as onelora
from onelora_compile.examples.serving.__main__ import backend_of, main
from onelora_compile.examples.serving.app import make_app
from onelora_compile.examples.serving.client import connected
from onelora_compile.examples.serving.in_thread import serving
from onelora_compile.exporters import export_onnx


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def order():
    return np.random.default_rng(0)


def test_the_command(world, tmp_path, order):
    """It serves, keeps what is uploaded, and ends at SIGTERM."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "onelora_compile.examples.serving", world.bank, "--port", str(port)]
    done = subprocess.Popen([*command, "--adapters", tmp_path / "kept"], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while done.poll() is None and time.monotonic() < deadline:
            try:
                with connected(port) as client:
                    client.add(world.files["a5"], "a5")
                    world.ask(client, "a5", order)
                break
            except ConnectionRefusedError:
                time.sleep(0.2)
        done.send_signal(signal.SIGTERM)
        _, log = done.communicate(timeout=60)
    finally:
        done.kill()
    assert "Finished server process" in log
    assert "Traceback" not in log
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["a5.safetensors"]
    with serving(make_app(world.backend("bank"), tmp_path / "kept")) as port, connected(port) as client:
        assert client.adapters() == ["a0", "a1", "a5"]
        world.ask(client, "a5", order)


def test_a_start_that_fails_says_why(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argument, message in (
        ("missing.onnx", "there is no file missing.onnx"),
        ("model.bin", "neither a file *.onnx nor module:function"),
    ):
        monkeypatch.setattr(sys, "argv", ["serving", argument])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr().err
        assert (left.value.code, said.startswith("error: "), message in said) == (1, True, True), said
    export_onnx(
        world.base,
        (torch.arange(10).reshape(2, 5),),
        tmp_path / "fixed.onnx",
        adapters="bank",
        bank=[world.files["a0"]],
    )
    with pytest.raises(onelora.ConfigError, match="have no dynamic batch"):
        backend_of(str(tmp_path / "fixed.onnx"), 1)
