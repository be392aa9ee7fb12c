"""What is no name of a file is refused by the argument that it was given for, before anything is read or written."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.cli import main
from onelora_compile.exporters import (
    EngineRunner,
    OnnxRunner,
    build_engine,
    bundle,
    convert_adapter,
    export_onnx,
    export_runtime,
    fold_onnx,
    refit_engine,
)
from onelora_compile.file_names import as_path, as_paths
from onelora_compile.testing import fill_vectors

X = torch.randn(2, 4)
WRONG = {
    b"a.onnx": r"=b'a.onnx' is in bytes: give a str",
    "": r"='' is no name of a file",
    "a\0b.onnx": r"='a\\x00b.onnx' holds a NUL character",
    "a\udcff.onnx": r"='a\\udcff.onnx' is not UTF-8, and ONNX and safetensors open no such file: rename it",
    3: r" is an int, not the name of a file",
    None: r" is None, not the name of a file",
}
SEVERAL = {
    "a.safetensors": r"='a.safetensors' is one file where a list is meant: \['a.safetensors'\]",
    Path("a.safetensors"): r"=PosixPath\('a.safetensors'\) is one file where a list is meant",
    None: r" is None: give a list of files",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    export_onnx(model, (X,), folder / "base.onnx", progress=False)
    onelora.save_adapter(fill_vectors(onelora.adapt(model), 0.1), folder / "a.safetensors")
    return model, folder


@pytest.fixture
def files(made, tmp_path, monkeypatch):
    model, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return model


def calls(model):
    """Every public function that is given names of files: (the argument, a call with it)."""
    base, a = "base.onnx", "a.safetensors"
    return [
        ("path", lambda name: export_onnx(model, (X,), name)),
        ("path", lambda name: OnnxRunner(name)),
        ("path", lambda name: EngineRunner(name)),
        ("path", lambda name: onelora.explain(model, X).draw(name)),
        ("path", lambda name: onelora.save_adapter(model, name)),
        ("source", lambda name: convert_adapter(name, "b.onnx_adapter")),
        ("out", lambda name: convert_adapter(a, name)),
        ("onnx", lambda name: bundle(name, "folder")),
        ("out", lambda name: bundle(base, name)),
        ("onnx", lambda name: build_engine(name, "m.engine")),
        ("engine", lambda name: build_engine(base, name)),
        ("engine", lambda name: refit_engine(name, a)),
    ]


@pytest.mark.parametrize("name", WRONG, ids=repr)
def test_what_is_no_name(files, name):
    before = sorted(Path().iterdir())
    for argument, call in calls(files):
        with pytest.raises(onelora.ConfigError, match=f"^{argument}{WRONG[name]}"):
            call(name)
    assert sorted(Path().iterdir()) == before


def test_a_name_with_a_nul_for_what_is_folded(files):
    with pytest.raises(onelora.ConfigError, match=r"^out='a\\x00b.onnx' holds a NUL character"):
        fold_onnx("base.onnx", "a.safetensors", "a\0b.onnx")


@pytest.mark.parametrize("old", [False, True], ids=["new", "a file is there"])
def test_a_name_that_ends_as_a_folder_s_is_no_file_s(files, old):
    a = "a.safetensors"
    writers = [
        ("path", "m.onnx", lambda name: export_onnx(files, (X,), name, progress=False)),
        ("path", "m.pt2", lambda name: export_runtime(files, (X,), name, runtime="pt2")),
        ("path", "m.svg", lambda name: onelora.explain(files, X).draw(name)),
        ("path", "b.safetensors", lambda name: onelora.save_adapter(files, name)),
        ("out", "m.onnx", lambda name: fold_onnx("base.onnx", a, name, progress=False)),
        ("out", "b.onnx_adapter", lambda name: convert_adapter(a, name)),
        ("out", "b.safetensors", lambda name: onelora.combine({a: 1.0}, name)),
        ("engine", "m.engine", lambda name: build_engine("base.onnx", name)),
        ("timing_cache", "m.cache", lambda name: build_engine("base.onnx", "n.engine", timing_cache=name)),
        ("out", "m.engine", lambda name: refit_engine("base.engine", a, name)),
    ]
    for argument, name, write in writers:
        if old:
            Path(name).write_bytes(b"")
        before = contents()
        with pytest.raises(onelora.ConfigError, match=f"^{argument}='{name}/' ends in '/', as a folder's name does"):
            write(f"{name}/")
        assert contents() == before


@pytest.mark.parametrize(
    "command",
    [
        "export user.py:model -o m.onnx/",
        "fold base.onnx a.safetensors -o new/",
        "combine a.safetensors:1 -o b.safetensors/",
        "convert a.safetensors -o b.onnx_adapter/",
        "engine base.onnx -o m.engine/",
        "refit m.engine a.safetensors -o n.engine/",
    ],
)
def test_a_command_writes_no_file_where_a_folder_is_named(files, command, capsys):
    before = contents()
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code in (1, 2)
    assert "ends in '/', as a folder's name does: give the name of a file" in " ".join(capsys.readouterr().err.split())
    assert contents() == before


def contents():
    return {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.mark.parametrize("given", SEVERAL, ids=repr)
def test_one_name_where_several_are_meant(files, given):
    with pytest.raises(onelora.ConfigError, match=f"^bank{SEVERAL[given]}"):
        export_onnx(files, (X,), "m.onnx", adapters="bank", bank=given)
    with pytest.raises(onelora.ConfigError, match=f"^adapters{SEVERAL[given]}"):
        bundle("base.onnx", "folder", adapters=given)


def test_names_that_are_right():
    assert as_path("m.onnx", "path") == as_path(Path("m.onnx"), "path") == Path("m.onnx")
    assert as_paths(["a", Path("b")], "bank") == as_paths(("a", "b"), "bank") == [Path("a"), Path("b")]
    with pytest.raises(onelora.ConfigError, match=r"^bank\[1\]=b'b' is in bytes"):
        as_paths(["a", b"b"], "bank")
