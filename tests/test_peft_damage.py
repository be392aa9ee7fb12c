"""Damaged folders of PEFT, and writers that are killed: a clear error or the same adapter, and nothing is lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft_folders
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter
from onelora_compile.testing import fill_vectors


def test_only_a_folder_of_peft_is_replaced(tmp_path):
    folder = peft_folders.ours(tmp_path / "a")
    model = onelora.adapt(zoo.tiny_vit()[0])
    onelora.save_adapter(model, folder, format="peft")
    (folder / "notes.txt").write_text("mine")
    for path, message in (
        (folder, "holds notes.txt"),
        (tmp_path / "a.safetensors", "that ends in .safetensors is an adapter"),
        (Path(__file__), "is a file, and a folder is written"),
    ):
        with pytest.raises(onelora.ConfigError, match=message):
            onelora.save_adapter(model, path, format="peft")
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(onelora.ConfigError, match="format='pefft' is not one of 'onelora', 'peft', 'peft-miss'"):
        onelora.save_adapter(model, tmp_path / "b", format="pefft")
    with pytest.raises(onelora.ConfigError, match="would overwrite the input"):
        convert_adapter(folder, folder, format="peft")
    with pytest.raises(FileNotFoundError):
        onelora.save_adapter(model, tmp_path / "no" / "a", format="peft")


KILLED = """
import sys, os, signal, zoo
import onelora_compile as onelora
from onelora_compile.weights import peft_folder
model = onelora.adapt(zoo.tiny_vit()[0])
real = peft_folder.replacing
def killed(path, *rest):
    if path.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *rest)
peft_folder.replacing = killed
onelora.save_adapter(model, sys.argv[1], format="peft")
"""


@pytest.mark.parametrize("when", [pytest.param(peft_folders.TENSORS, marks=pytest.mark.slow), peft_folders.CONFIG])
def test_killed_while_writing_leaves_the_old_folder(when, tmp_path):
    folder = peft_folders.ours(tmp_path / "a")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), when], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_clear_error_or_the_same_adapter(data, tmp_path_factory):
    source = tmp_path_factory.getbasetemp() / "sound"
    if not source.exists():
        onelora.save_adapter(fill_vectors(onelora.adapt(zoo.MLP())), source, format="peft")
    place = tmp_path_factory.mktemp("damaged") / "a"
    shutil.copytree(source, place)
    name = data.draw(st.sampled_from(sorted(os.listdir(place))))
    content = bytearray((place / name).read_bytes())
    header = len(content) if name == peft_folders.CONFIG else 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (place / name).write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    with contextlib.suppress(onelora.OneLoRAError):
        file = onelora.read_adapter(place)
        assert all(torch.isfinite(one).all() and one.dtype == torch.float32 for one in file.vectors.values())
