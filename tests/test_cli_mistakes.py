"""Every command with every kind of wrong input: one line on standard error, exit code 1 or 2, no traceback."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_mistakes import EMPTY, FUNCTIONS, READS, USAGE, USER, VALUES, WITH_FUNCTION, WRITES, WRONG_FILES

import onelora_compile as onelora
from onelora_compile.cli import main
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the user's modules, a model in two modes, an adapter, and files that are wrong."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mymodels.py").write_text(USER)
    (folder / "broken_syntax.py").write_text("x = 1\ndef make(:\n")
    (folder / "broken_import.py").write_text("import not_there\n")
    (folder / "broken_name.py").write_text("from os import not_there\n")
    (folder / "broken_value.py").write_text("1 / 0\n")
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), torch.randn(2, 4)
    dynamic = ({0: "batch"},)
    export_onnx(model, (x,), folder / "base.onnx", dynamic_shapes=dynamic)
    export_onnx(torch.nn.Linear(5, 2), (torch.randn(2, 5),), folder / "other.onnx", dynamic_shapes=dynamic)
    onelora.save_adapter(fill_vectors(onelora.adapt(model)), folder / "a.safetensors")
    export_onnx(model, (x,), folder / "input.onnx", adapters="input", dynamic_shapes=dynamic)
    np.savez(folder / "x.npz", input=x.numpy())
    np.savez(folder / "wrong.npz", weights=x.numpy())
    np.savez(folder / "objects.npz", input=np.array([{}, None], dtype=object))
    for name, whole in (("half.npz", "x.npz"), ("half.onnx", "input.onnx"), ("half.safetensors", "a.safetensors")):
        content = (folder / whole).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    for name in ("empty", "empty.onnx"):
        (folder / name).write_bytes(b"")
    for name in (
        "text.npz",
        "text.onnx",
        "text.safetensors",
        "text.vectors",
        "text.onnx_adapter",
        "text.engine",
        "text.pem",
    ):
        (folder / name).write_text("this is no such file\n")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture
def project(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    yield prepared
    for name in ("mymodels", "broken_syntax", "broken_import", "broken_name", "broken_value"):
        sys.modules.pop(name, None)


def mistake(capfd, arguments, code=1):
    """The one line that a command with a mistake writes, also past Python's own streams."""
    before = set(os.listdir())
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    said = capfd.readouterr()
    assert left.value.code == code, (arguments, said)
    lines = said.err.splitlines()
    assert len(lines) == 1, (arguments, said.err)
    assert lines[0].startswith("error: ")
    assert 15 < len(lines[0]) < 1000, lines[0]
    assert set(os.listdir()) - before <= {"__pycache__"}
    return lines[0]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("command", WITH_FUNCTION)
def test_functions_that_fail(project, capfd, command, function):
    line = mistake(capfd, [one.format(function) for one in WITH_FUNCTION[command]])
    if (command, function) != ("verify", "mymodels"):  # there that is the name of a file
        assert FUNCTIONS[function] in line


@pytest.mark.parametrize("command", READS)
def test_files_that_are_not_what_they_should_be(project, capfd, command):
    for file in WRONG_FILES:
        arguments = [one.format(file) for one in READS[command]]
        line = mistake(capfd, arguments)
        assert file in line or "TensorRT" in line, (arguments, line)
        assert "[Errno" not in line, (arguments, line)  # "there is no file gone", as everywhere


@pytest.mark.parametrize("command", WRITES)
def test_outputs_that_can_not_be_written(project, capfd, command):
    for out in ("gone/out", "text.npz/out"):
        if (command, out) == ("demo", "gone/out"):  # makes its folder
            continue
        mistake(capfd, [one.format(out) for one in WRITES[command]])


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage(project, capfd, arguments):
    assert "--help shows" in mistake(capfd, arguments, code=2)


@pytest.mark.parametrize(("arguments", "said"), VALUES, ids=[" ".join(one) for one, _ in VALUES])
def test_values(project, capfd, arguments, said):
    assert said in mistake(capfd, arguments)


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_empty_names(project, capfd, arguments):
    number = next(number for number, one in enumerate(arguments) if not one.strip() or one.endswith("="))
    before = arguments[number] if arguments[number].endswith("=") else arguments[number - 1]
    line = mistake(capfd, arguments, code=2)
    assert f"nothing stands after {before!r} but an empty argument" in line


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "160", "PYTHONCOERCECLOCALE": "0"}


def test_ascii_locale(project):
    """Tables and messages of a terminal that knows no more than ASCII, one process for all commands."""
    (project / "größe.safetensors").write_bytes((project / "a.safetensors").read_bytes())
    commands = [
        ["inspect", "größe.safetensors"],
        ["inspect", "input.onnx"],
        ["doctor"],
        ["--help"],
        ["export", "--help"],
        ["verify", "base.onnx", "base.onnx"],
        ["inspect", "größe.onnx"],
        ["export", "mymodels:raises", "-o", "größe.onnx"],
    ]
    code = (
        "import sys, json\nfrom onelora_compile.cli import main\n"
        "for one in json.loads(sys.argv[1]):\n"
        "    try: main([text.encode().decode('ascii', 'surrogateescape') for text in one])\n"
        "    except SystemExit as left: print('left with', left.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], env=os.environ | ASCII, capture_output=True, check=False
    )
    out, err = done.stdout.decode(), done.stderr.decode()  # the bytes of file names are as they were
    assert out.replace("größe", "").isascii(), out
    assert [one.split()[0] for one in out.split("left with ")[1:]] == [
        "None",
        "None",
        "None",
        "0",
        "0",
        "None",
        "1",
        "1",
    ]
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "error"], err
    assert lines[0].endswith("there is no file größe.onnx")
    assert "norm of b 1T / norm of W" in out
    assert "| passed |" in out


def test_a_stream_of_any_encoding(monkeypatch):
    for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        from onelora_compile.cli.output import print_in_any_locale, print_report

        print_in_any_locale()
        print_report("1ᵀ … größe [/red] \udcff")
        stream.flush()
        assert b"[/red] \xff" in stream.buffer.getvalue()


def test_in_a_process_of_its_own(project):
    command = [sys.executable, "-m", "onelora_compile", "verify", "base.onnx", "mymodels:wrong_shape"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_environment_asks_for_tracebacks(project, monkeypatch):
    monkeypatch.setenv("ONELORA_TRACEBACK", "1")
    with pytest.raises(onelora.ConfigError, match="raised KeyError") as raised:
        main(["export", "mymodels:raises", "-o", "out.onnx"])
    assert isinstance(raised.value.__cause__, KeyError)
