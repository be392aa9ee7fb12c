"""No writer writes over what it reads, and clean-up removes nothing that anybody still names."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from faults import content
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ConfigError
from onelora_compile.exporters import build_engine, bundle, convert_adapter, export_onnx, fold_onnx, refit_engine
from onelora_compile.testing import fill_vectors

X = torch.randn(2, 24)


def outputs(path):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base.onnx of a foreign exporter with base.onnx.data, a model of each mode, two adapters, and a script."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    torch.onnx.export(model, (X,), folder / "base.onnx", dynamo=True, external_data=True, verbose=False)
    held = onnx.load(folder / "base.onnx")
    onnx.save(held, folder / "base.onnx", save_as_external_data=True, location="base.onnx.data", size_threshold=0)
    onelora.adapt(model)
    for seed, name in enumerate("ab"):
        onelora.save_adapter(fill_vectors(model, 0.3, seed), folder / f"{name}.safetensors")
        torch.save(model(X).detach(), folder / f"{name}.pt")
    for mode in ("input", "load"):
        export_onnx(model, (X,), folder / f"{mode}.onnx", adapters=mode, progress=False)
    return folder


@pytest.fixture
def here(made, tmp_path):
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def link(kind, source, name):
    place = source.with_name(name)
    {"symbolic": place.symlink_to, "hard": place.hardlink_to}[kind](source)
    return place


def writers(here):
    """Every function that reads files and writes one: (call with an output, the inputs it must not touch)."""
    a, b, base = here / "a.safetensors", here / "b.safetensors", here / "base.onnx"

    def bank(out):
        torch.manual_seed(0)
        loaded = onelora.load_adapter(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval(), a)
        export_onnx(loaded, (X,), out, adapters="bank", bank=[a], progress=False)

    return {
        "fold": (lambda out: fold_onnx(base, a, out, progress=False), [a, here / "base.onnx.data"]),
        "export": (bank, [a]),
        "convert": (lambda out: convert_adapter(a, out), [a]),
        "convert like": (lambda out: convert_adapter(a, out, like=here / "load.onnx"), [a]),
        "combine": (lambda out: onelora.combine({a: 0.7, b: -0.3}, out), [a, b]),
        "bundle": (
            lambda out: bundle(here / "input.onnx", out, adapters=[a], selftest=False, progress=False),
            [a, here / "input.onnx", here],
        ),
    }


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


def fold(here, name, source, out):
    fold_onnx(here / source, here / f"{name}.safetensors", here / out, progress=False)


def right(here, name, path):
    """Whether the model at `path` is the base with that adapter."""
    return np.allclose(outputs(here / path), torch.load(here / f"{name}.pt").numpy(), rtol=1e-4, atol=1e-4)


def weights(here, start):
    return sorted(path.name for path in here.iterdir() if path.name.startswith(start) and path.suffix == ".data")


def test_weights_of_another_exporter_stay_and_our_own_are_removed_when_nobody_names_them(here):
    shutil.copy(here / "base.onnx", here / "decoder_with_past.onnx")  # two models, one file of weights
    base = outputs(here / "base.onnx")
    fold(here, "a", "base.onnx", "base.onnx")
    assert "base.onnx.data" in weights(here, "base.onnx")
    assert right(here, "a", "base.onnx")
    assert np.array_equal(outputs(here / "decoder_with_past.onnx"), base)
    for name in "aba":
        fold(here, name, "decoder_with_past.onnx", "out.onnx")
        assert right(here, name, "out.onnx")
        assert len(weights(here, "out.onnx")) == 1


def test_a_copy_that_is_folded_over_its_original_keeps_its_weights(here):
    fold(here, "a", "base.onnx", "model.onnx")
    shutil.copy(here / "model.onnx", here / "copy.onnx")
    fold(here, "b", "base.onnx", "model.onnx")
    assert right(here, "a", "copy.onnx")
    assert right(here, "b", "model.onnx")
    assert len(weights(here, "model.onnx")) == 2
    (here / "copy.onnx").unlink()
    fold(here, "a", "base.onnx", "model.onnx")
    assert right(here, "a", "model.onnx")


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_of_several_writers_the_last_one_wins_whole(here, how):
    if how == "threads":
        writers = [threading.Thread(target=fold, args=(here, name, "base.onnx", "out.onnx")) for name in "abab"]
        for one in writers:
            one.start()
        for one in writers:
            one.join()
    else:
        program = (
            "import sys; from onelora_compile.exporters import fold_onnx\n"
            "for _ in range(5): fold_onnx('base.onnx', sys.argv[1], 'out.onnx', progress=False)"
        )
        run = [sys.executable, "-P", "-c", program]
        children = [subprocess.Popen([*run, f"{name}.safetensors"], cwd=here) for name in "ab"]
        assert [child.wait() for child in children] == [0, 0]
    assert any(right(here, name, "out.onnx") for name in "ab")
    assert len(weights(here, "out.onnx")) == 1
    assert not list(here.glob(".onelora-*"))


def test_a_link_is_replaced_by_the_model_and_what_it_pointed_to_stays(here, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    fold_onnx(here / "base.onnx", here / "a.safetensors", store / "model.onnx", progress=False)
    before = content(store)
    (here / "model.onnx").symlink_to(store / "model.onnx")
    fold(here, "b", "base.onnx", "model.onnx")
    assert content(store) == before
    assert not (here / "model.onnx").is_symlink()
    assert right(here, "b", "model.onnx")


@pytest.mark.parametrize("name", ["n" * 250 + ".onnx", "\N{GREEK SMALL LETTER ALPHA}" * 125 + ".onnx"])
def test_names_may_be_as_long_as_names_may_be(here, name):
    assert len(name.encode()) == 255
    for adapter in "ab":
        fold(here, adapter, "base.onnx", name)
        assert right(here, adapter, name)
    onelora.save_adapter(adapted(), here / (name[:-12] + ".safetensors"))


def adapted():
    return onelora.adapt(nn.Sequential(nn.Linear(24, 32)))


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
