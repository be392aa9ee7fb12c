"""Clean-up removes no weights that anybody still names, and of several writers one wins whole."""

import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from faults import content
from kinds_of_files import adapted, copied_files, made_files, outputs

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx

made, here = pytest.fixture(scope="module")(made_files), pytest.fixture(copied_files)


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
