"""No writer writes over what it reads, or over a file of another kind."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import content
from kinds_of_files import X, adapted, copied_files, made_files, outputs, writers
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ConfigError
from onelora_compile.exporters import build_engine, convert_adapter, export_onnx, fold_onnx, refit_engine

made, here = pytest.fixture(scope="module")(made_files), pytest.fixture(copied_files)


def link(kind, source, name):
    place = source.with_name(name)
    {"symbolic": place.symlink_to, "hard": place.hardlink_to}[kind](source)
    return place


@pytest.mark.parametrize("kind", ["itself", "relative", "symbolic", "hard"])
@pytest.mark.parametrize("name", ["fold", "export", "convert", "convert like", "combine", "bundle"])
def test_no_writer_takes_an_input_for_its_output(here, name, kind, monkeypatch):
    write, inputs = writers(here)[name]
    for source in inputs:
        if source == here and kind == "hard":
            continue
        out = source
        if kind == "relative":
            monkeypatch.chdir(here)
            out = Path("..") / "work" / source.relative_to(here)
        elif kind != "itself":
            out = link(kind, source, f"{kind}-{source.name}")
        before = content(here)
        with pytest.raises(onelora.ConfigError, match=r"would overwrite the input|is a folder that holds"):
            write(out)
        assert content(here) == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc on this system")
@pytest.mark.parametrize("name", ["fold", "export", "convert", "convert like", "combine", "bundle"])
def test_a_link_to_an_open_file_stays_a_link(here, name):
    """As /dev/stdout is, which everybody on the machine has, and which leads to a file where output goes to one."""
    write, _ = writers(here)[name]
    with (here / "out.txt").open("w") as file:
        out = here / "l.onnx_adapter"
        out.symlink_to(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises((OSError, onelora.OneLoRAError), match=r"is a device, a pipe or a socket|is no bundle"):
            write(out)
        assert out.readlink() == Path(f"/proc/self/fd/{file.fileno()}")
    assert (here / "out.txt").read_text() == ""
    assert not list(here.glob(".onelora-*"))


@pytest.mark.parametrize("name", ["fold", "export", "convert", "convert like", "combine", "bundle"])
@pytest.mark.parametrize("kind", ["itself", "symbolic"])
def test_a_pipe_stays_a_pipe(here, name, kind):
    """As /dev/null and /dev/stdout stay what they are: they can't be replaced by a file."""
    write, _ = writers(here)[name]
    os.mkfifo(here / "pipe.onnx_adapter")
    out = here / "pipe.onnx_adapter" if kind == "itself" else link(kind, here / "pipe.onnx_adapter", "l.onnx_adapter")
    errors = (OSError, onelora.OneLoRAError)
    with pytest.raises(errors, match=r"is a device, a pipe or a socket|is no bundle|not a bundle"):
        write(out)
    assert stat.S_ISFIFO((here / "pipe.onnx_adapter").stat().st_mode)
    assert not list(here.glob(".onelora-*"))


@pytest.mark.parametrize(("kind", "said"), [("pipe", "is a device, a pipe or a socket"), ("folder", "is a folder")])
def test_what_is_no_file_is_not_waited_for(here, kind, said):
    base = here / "no.onnx"
    if kind == "pipe":
        os.mkfifo(base)
    else:
        base.mkdir()
    with pytest.raises((OSError, onelora.OneLoRAError), match=rf"no\.onnx {said}"):
        fold_onnx(base, here / "a.safetensors", here / "out.onnx")


@pytest.mark.parametrize(
    "name",
    [
        "load.onnx.vectors",
        "base.onnx.data",
        "other.safetensors",
        "w.bin",
        "w.pt",
        "w.json",
        "w.npz",
        "notes",
        "m.engine",
    ],
)
@pytest.mark.parametrize("writer", ["fold", "export", "save", "combine", "engine"])
def test_no_writer_takes_the_place_of_a_file_of_another_kind(here, writer, name):
    from safetensors.torch import save_file

    save_file({"onelora": torch.ones(2)}, here / "other.safetensors")
    (here / "w.bin").write_bytes(np.ones(9, "f4").tobytes())
    torch.save(torch.ones(2), here / "w.pt")
    (here / "w.json").write_text('{"a": 1}')
    np.savez(here / "w.npz", a=np.ones(2))
    (here / "notes").write_text("mine")
    (here / "m.engine").write_bytes(b"ftrt")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    model = onelora.load_adapter(base, here / "a.safetensors")
    write = {
        "fold": lambda out: fold_onnx(here / "base.onnx", here / "a.safetensors", out, progress=False),
        "export": lambda out: export_onnx(model, (X,), out, progress=False),
        "save": lambda out: onelora.save_adapter(model, out),
        "combine": lambda out: onelora.combine({here / "a.safetensors": 0.5}, out),
        "engine": lambda out: build_engine(here / "input.onnx", out, progress=False),
    }[writer]
    if writer == "engine" and name == "m.engine":
        return
    before = content(here)
    with pytest.raises(ConfigError, match=r"a file that ends in|is there and is not|would overwrite the input"):
        write(here / name)
    assert content(here) == before


def test_a_converted_adapter_takes_not_the_place_of_the_weights_of_a_model(here):
    from safetensors.torch import save_file

    convert_adapter(here / "a.safetensors", here / "a.onnx_adapter")
    save_file({"weight": torch.ones(2)}, here / "model.safetensors")
    before = content(here)
    with pytest.raises(ConfigError, match="is there and is not an adapter"):
        convert_adapter(here / "a.onnx_adapter", here / "model.safetensors", like=here / "input.onnx")
    assert content(here) == before


@pytest.mark.parametrize("name", ["m.onnx", "m.bin", "m"])
def test_a_file_of_the_same_kind_is_replaced(here, name):
    fold_onnx(here / "base.onnx", here / "a.safetensors", here / name, progress=False)
    fold_onnx(here / "base.onnx", here / "b.safetensors", here / name, progress=False)
    (here / "half.onnx").write_bytes(b"")
    fold_onnx(here / "base.onnx", here / "b.safetensors", here / "half.onnx", progress=False)
    np.testing.assert_array_equal(outputs(here / name), outputs(here / "half.onnx"))


def test_an_engine_is_none_of_its_inputs(here):
    base, a = here / "base.onnx", here / "a.safetensors"
    beside = a.rename(here / "m.engine.safetensors")
    for call in (
        lambda: build_engine(base, base),
        lambda: build_engine(base, here / "base.onnx.data"),
        lambda: build_engine(base, here / "m.engine", adapter=beside),
        lambda: build_engine(base, here / "m.engine", timing_cache=base),
        lambda: build_engine(base, here / "m.engine", timing_cache=here / "base.onnx.data"),
        lambda: refit_engine(here / "m.engine", beside),
        lambda: refit_engine(here / "m.engine", here / "b.safetensors", out=here / "b.safetensors"),
    ):
        before = content(here)
        with pytest.raises(onelora.ConfigError, match="would overwrite the input"):
            call()
        assert content(here) == before


def test_a_folder_is_replaced_only_if_it_is_a_bundle_and_nothing_else(here):
    out = here / "out"
    write, _ = writers(here)["bundle"]
    out.mkdir()
    write(out)
    write(out)
    (out / "__pycache__").mkdir()
    write(out)
    for name, text, message in (
        ("notes.txt", "mine", "holds what is none of it: notes.txt"),
        ("manifest.json", '{"name": "app"}', "is no bundle"),
        ("manifest.json", "[]", "is no bundle"),
    ):
        (out / name).write_text(text)
        before = content(here)
        with pytest.raises(onelora.StateError, match=message):
            write(out)
        assert content(here) == before
        (out / name).unlink()
        if name == "notes.txt":
            write(out)


@pytest.mark.parametrize(
    "write",
    [
        lambda here: onelora.save_adapter(adapted(), here / "kept.onnx"),
        lambda here: fold_onnx(here / "base.onnx", here / "a.safetensors", here / "kept.safetensors", progress=False),
        lambda here: export_onnx(adapted(), (X,), here / "kept.safetensors", progress=False),
        lambda here: convert_adapter(here / "a.safetensors", here / "kept.onnx", like=here / "load.onnx"),
        lambda here: build_engine(here / "base.onnx", here / "kept.onnx", progress=False),
        lambda here: build_engine(here / "base.onnx", here / "kept.safetensors", progress=False),
        lambda here: build_engine(here / "base.onnx", here / "m.engine", timing_cache=here / "kept.onnx"),
        lambda here: refit_engine(here / "m.engine", here / "a.safetensors", out=here / "kept.safetensors"),
    ],
    ids=["save", "fold", "export", "convert", "engine", "engine, adapter", "timing cache", "refit"],
)
def test_no_file_gets_the_name_of_another_kind(here, write):
    for name in ("kept.onnx", "kept.safetensors"):
        (here / name).write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match=r"give another name|the ending names the format"):
        write(here)
    assert all((here / name).read_bytes() == b"somebody's" for name in ("kept.onnx", "kept.safetensors"))
