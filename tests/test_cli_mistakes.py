"""Every command with every kind of wrong input: one line on standard error, exit code 1 or 2, no traceback."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import onelora_compile as onelora
from onelora_compile.cli import main
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors

USER = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))

def make(): return model(), (torch.randn(2, 4),)
def raises(): raise KeyError("weights\\nof the model")
def raises_deep(): return torch.zeros(2) @ torch.zeros(3)
def leaves(): raise SystemExit(3)
def needs(width): return model(), (torch.randn(2, width),)
def nothing(): pass
def number(): return 3
def four(): return 1, 2, 3, 4
def only_model(): return model()
def no_module(): return "model", (torch.randn(2, 4),)
def no_tensor(): return model(), (1, 2)
def mapping(): return model(), {"input": torch.randn(2, 4)}
def bad_kwargs(): return model(), (torch.randn(2, 4),), [1]
def wrong_shape(): return model(), (torch.randn(2, 5),)
def wrong_dtype(): return model(), (torch.randint(0, 2, (2, 4)),)
def wrong_name(): return model(), (), {"inputs": torch.randn(2, 4)}
def too_many(): return model(), (torch.randn(2, 4), torch.randn(2, 4))
async def later(): return make()
def generator(): yield make()
constant = 3
"""

FUNCTIONS = {
    "mymodels": "not of the form module:function",
    ":make": "not of the form module:function",
    "mymodels.py:make": "name the module as an import does",
    "./mymodels:make": "name the module as an import does",
    "nomodule:make": "run the command in the folder that holds the module",
    "mymodels:gone": "has no 'gone'",
    "mymodels:constant": "is no function but of type int",
    "mymodels:raises": "raised KeyError at mymodels.py:9",
    "mymodels:raises_deep": "raised RuntimeError at mymodels.py:10",
    "mymodels:leaves": "raised SystemExit at mymodels.py:11",
    "mymodels:needs": "is called without arguments: missing a required argument: 'width'",
    "mymodels:nothing": "must return (model, args) or (model, args, kwargs), not None",
    "mymodels:number": "not of type int",
    "mymodels:later": "is an async function, which nothing awaits here",
    "mymodels:generator": "not of type generator",
    "mymodels:four": "not of type tuple of 4",
    "mymodels:only_model": "not of type Sequential",
    "mymodels:no_module": "its model is of type str",
    "mymodels:no_tensor": "no tensor among the inputs",
    "mymodels:mapping": "return (model, (), kwargs)",
    "mymodels:bad_kwargs": "its kwargs are of type list",
    "broken_syntax:make": "raised SyntaxError at broken_syntax.py:2",
    "broken_import:make": "raised ModuleNotFoundError at broken_import.py:1: No module named 'not_there'",
    "broken_name:make": "raised ImportError at broken_name.py:1",
    "broken_value:make": "raised ZeroDivisionError at broken_value.py:1",
    "mymodels:wrong_shape": "called with the inputs that it returned, raised RuntimeError",
    "mymodels:wrong_dtype": "called with the inputs that it returned, raised RuntimeError",
    "mymodels:wrong_name": "called with the inputs that it returned, raised TypeError",
    "mymodels:too_many": "called with the inputs that it returned, raised TypeError",
}
WITH_FUNCTION = {
    "export": ("export", "{}", "-o", "out.onnx"),
    "verify": ("verify", "base.onnx", "{}"),
    "bench": ("bench", "{}", "--rounds", "2", "--no-compiled"),
}

# What a command reads and writes: files by the name of what is in their place.
READS = {
    "inspect": ("inspect", "{}"),
    "export": ("export", "mymodels:make", "-o", "out.onnx", "--adapter", "{}"),
    "export bank": ("export", "mymodels:make", "-o", "out.onnx", "--adapters", "bank", "--bank", "{}"),
    "fold base": ("fold", "{}", "a.safetensors", "-o", "out.onnx"),
    "fold adapter": ("fold", "base.onnx", "{}", "-o", "out.onnx"),
    "fold calibration": ("fold", "base.onnx", "a.safetensors", "-o", "out.onnx", "--calibration", "{}"),
    "bundle model": ("bundle", "{}", "-o", "out"),
    "bundle adapter": ("bundle", "input.onnx", "-o", "out", "--adapter", "{}", "--size", "batch=2"),
    "bundle inputs": ("bundle", "base.onnx", "-o", "out", "--inputs", "{}", "--size", "batch=2"),
    "convert": ("convert", "{}", "-o", "out.vectors", "--like", "input.onnx"),
    "convert like": ("convert", "a.safetensors", "-o", "out.vectors", "--like", "{}"),
    "combine": ("combine", "a.safetensors:1", "{}:-0.5", "-o", "out.safetensors"),
    "combine base": ("combine", "a.safetensors:1", "-o", "out.safetensors", "--trained", "add", "--base", "{}"),
    "verify artifact": ("verify", "{}", "base.onnx"),
    "verify reference": ("verify", "base.onnx", "{}"),
    "verify adapter": ("verify", "input.onnx", "input.onnx", "--adapter", "{}"),
    "engine model": ("engine", "{}", "-o", "out.engine"),
    "engine adapter": ("engine", "base.onnx", "-o", "out.engine", "--adapter", "{}", "--size", "batch=2"),
    "refit engine": ("refit", "{}", "a.safetensors"),
}
WRONG_FILES = (
    *("gone", "gone.onnx", "folder", "empty", "empty.onnx", "text.npz", "text.onnx", "text.safetensors"),
    *("text.vectors", "text.onnx_adapter", "text.engine", "half.npz", "half.onnx", "half.safetensors", "objects.npz"),
)
WRITES = {
    "export": ("export", "mymodels:make", "-o", "{}.onnx"),
    "fold": ("fold", "base.onnx", "a.safetensors", "-o", "{}.onnx"),
    "bundle": ("bundle", "base.onnx", "-o", "{}", "--size", "batch=2"),
    "convert": ("convert", "a.safetensors", "-o", "{}.vectors", "--like", "input.onnx"),
    "combine": ("combine", "a.safetensors:0.5", "-o", "{}.safetensors"),
    "engine": ("engine", "base.onnx", "-o", "{}.engine", "--size", "batch=2"),
    "demo": ("demo", "--quick", "-o", "{}"),
}

USAGE = [
    ("frobnicate",),
    ("--frobnicate",),
    ("export",),
    ("export", "mymodels:make"),
    ("export", "mymodels:make", "-o", "m.onnx", "--opset", "new"),
    ("inspect", "a", "b"),
    ("bench", "--rounds", "many"),
    ("fold", "base.onnx", "a.safetensors", "--wrong"),
    ("export", "mymodels:make", "-o", "out.onnx", "--adapters", "glue"),
    ("combine", "-o", "out.safetensors"),
    ("combine", "a.safetensors:1"),
    ("bundle", "base.onnx", "-o", "out", "--jetpack", "1"),
    ("engine", "base.onnx", "-o", "out.engine", "--precision", "fp15"),
]
VALUES = [
    (("export", "mymodels:make", "-o", "out.onnx", "--opset", "3"), "is the oldest"),
    (("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "batch"), "is not of the form 0=batch"),
    (("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "5=deep"), "no input with an axis 5"),
    (("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "y:0=rows"), "no input 'y' with an axis 0"),
    (("verify", "base.onnx", "base.onnx", "--size", "batch"), "is not of the form batch=8"),
    (("verify", "base.onnx", "base.onnx", "--size", "rows=3"), "sizes of rows, which base.onnx does not have"),
    (("verify", "base.onnx", "base.onnx", "--size", "input=3x5"), "is ['batch', 4] in the model, not [3, 5]"),
    (("verify", "base.onnx", "base.onnx", "--size", "batch=3x5"), "'batch' is one dimension"),
    (("verify", "base.onnx", "mymodels:make", "--size", "batch=3"), "--size is for two ONNX models"),
    (("verify", "base.onnx", "other.onnx"), "can't run other.onnx"),
    (("bundle", "base.onnx", "-o", "out", "--size", "batch=8,4,2"), "is not smallest, usual, largest"),
    (("bundle", "base.onnx", "-o", "out", "--size", "rows=8"), "shapes names rows; the model's inputs are"),
    (("bundle", "base.onnx", "-o", "out", "--size", "batch=8x2"), "a dimension takes three numbers"),
    (("bundle", "base.onnx", "-o", "out"), "--size batch=1,8,32"),
    (("engine", "base.onnx", "-o", "out.engine", "--size", "x=1x2,3,4"), "different numbers of axes"),
    (("bench", "mymodels:make", "--rounds", "1"), "at least 2 are needed"),
    (("fold", "base.onnx", "a.safetensors", "-o", "out.onnx", "--calibration", "wrong.npz"), "names ['weights']; the"),
    (("convert", "a.safetensors", "-o", "out.txt"), "the ending names the format"),
    *(
        (("combine", word, "-o", "out.safetensors"), f"{word!r} is not PATH:WEIGHT")
        for word in (
            "",
            ":",
            "1",
            ":1",
            "a.safetensors:",
            "b:nan",
            "b:inf",
            "b:1_0",
            "b:0,5",
            "b:1/3",
            "b:--1",
            "b:0x1",
            "b:٣",
        )
    ),
    (("combine", "a.safetensors", "-o", "out.safetensors"), "a file and a number: a.safetensors:1"),
    (("combine", "a.safetensors:1", "a.safetensors:2", "-o", "out.safetensors"), "is given twice"),
    (("combine", "a.safetensors:1", "./a.safetensors:2", "-o", "out.safetensors"), "are one file"),
    (("combine", "a.safetensors:1e999", "-o", "out.safetensors"), "give a finite number"),
    (("combine", "a.safetensors:1e60", "-o", "out.safetensors"), "the sum does not fit its dtype"),
    (("combine", "a.safetensors:1", "-o", "out.safetensors", "--trained", "glue"), "trained='glue' is not one of"),
    (("combine", "a.safetensors:1", "-o", "out.safetensors", "--trained", "from:b"), "is none of the adapters"),
    (("combine", "a.safetensors:1", "-o", "out.safetensors", "--base", "b"), "base= is for trained='add'"),
    (("combine", "a.safetensors:1", "-o", "out.onnx"), "a file that ends in .onnx is an ONNX model"),
]


# A name of a file that is empty, as of a variable that is not set: what stands before it is told.
EMPTY = [
    *(tuple("" if "{}" in word else word for word in words) for words in (READS | WRITES).values()),
    ("bench", ""),
    ("export", "", "-o", "out.onnx"),
    ("verify", " ", "base.onnx"),
    ("fold", "base.onnx", "a.safetensors", "--output="),
    ("fold", "", "", "-o", ""),
]


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
    for name in ("text.npz", "text.onnx", "text.safetensors", "text.vectors", "text.onnx_adapter", "text.engine"):
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
