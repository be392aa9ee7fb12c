"""Sums of adapters that can't be meant: other bases and layers, wrong arguments, wrong files; nothing is written."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from summed import adapter, base, two_adapters
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter


@pytest.fixture
def pair(tmp_path, monkeypatch):
    return two_adapters(tmp_path, monkeypatch)


def test_another_base_is_refused_with_both_names(pair):
    adapter("other.safetensors", of=base(7))
    before = sorted(os.listdir())
    with pytest.raises(onelora.BaseMismatchError, match=r"a\.safetensors and other\.safetensors.*0 \(differs by"):
        onelora.combine({"a.safetensors": 1, "b.safetensors": 1, "other.safetensors": 1}, "c.safetensors")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("fr", "adapter file", True),
        ("fr.safetensors", "adapter file", False),
        ("gone/fr.safetensors", "adapter file", False),
        ("gone/fr", "file or folder", False),  # it may be an id on the Hub
    ],
)
def test_a_name_without_a_model_says_what_it_may_be(pair, name, kind, hint):
    with pytest.raises(FileNotFoundError, match=f"^there is no {kind} {name}") as error:
        onelora.combine({"a.safetensors": 1, name: 1}, "c.safetensors")
    assert ("give model= too" in str(error.value)) == hint
    assert not Path("c.safetensors").exists()


def test_other_sizes_are_refused_with_both(pair):
    wide = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    adapter("wide.safetensors", ["0"], of=wide)
    with pytest.raises(onelora.AdapterFileError, match=r"'0' has a vector of \[5\] in a\.saf.* and \[6\] in wide\.saf"):
        onelora.combine({"a.safetensors": 1, "wide.safetensors": 1})
    adapter("deep.safetensors", ["0", "2"], of=nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)))
    with pytest.raises(onelora.AdapterFileError, match=r"'0' has a layer of in_features 3 .* and 7 in deep\.saf"):
        onelora.combine({"a.safetensors": 1, "deep.safetensors": 1})


def test_another_kind_of_layer_is_refused(tmp_path):
    from transformers.pytorch_utils import Conv1D

    adapter(tmp_path / "linear.safetensors", ["0"], of=nn.Sequential(nn.Linear(3, 5)))
    adapter(tmp_path / "gpt2.safetensors", ["0"], of=nn.Sequential(Conv1D(5, 3)))
    with pytest.raises(onelora.AdapterFileError, match=r"'0' has a layer of kind linear in .* and Conv1D in"):
        onelora.combine({tmp_path / "linear.safetensors": 1, tmp_path / "gpt2.safetensors": 1})


@pytest.mark.parametrize(
    "weight", [float("nan"), float("inf"), -float("inf"), 10**400, True, "0.5", None, 1j, torch.ones(2), [1]]
)
def test_a_weight_that_is_no_finite_number(pair, weight):
    with pytest.raises(onelora.ConfigError, match=r"the weight of a\.safetensors is .*: give a finite number"):
        onelora.combine({"a.safetensors": weight})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "there is no adapter"),
        (["a.safetensors"], "is no dict of adapters and weights"),
        ("a.safetensors", "is no dict of adapters and weights"),
        ({"": 1}, "is no name of a file"),
        ({3: 1}, "an adapter is an int, not the name of a file"),
        ({"a.safetensors": 1, Path("a.safetensors"): 2}, "are one file"),
        ({"a.safetensors": 1, "./a.safetensors": 2}, "are one file"),
        ({"a.safetensors": 1, "soft.safetensors": 2}, "are one file"),
        ({"a.safetensors": 1, "hard.safetensors": 2}, "are one file"),
    ],
)
def test_adapters_that_are_none_or_twice(pair, given, message):
    Path("soft.safetensors").symlink_to("a.safetensors")
    Path("hard.safetensors").hardlink_to("a.safetensors")
    with pytest.raises(onelora.ConfigError, match=message):
        onelora.combine(given)


def test_options_that_can_not_be_meant(pair):
    a = {"a.safetensors": 1}
    words: list[Any] = ["glue", "from", None, 3]
    for trained in words:
        with pytest.raises(onelora.ConfigError, match=r"trained=.* is not one of 'refuse', 'drop', 'add'"):
            onelora.combine(a, trained=trained)
    with pytest.raises(onelora.ConfigError, match=r"base= is for an adapter \.gguf, or for trained='add'"):
        onelora.combine(a, base={})
    with pytest.raises(FileNotFoundError, match=r"no adapter file gone\.safetensors"):
        onelora.combine(a | {"gone.safetensors": 1})


def test_a_sum_that_float32_can_not_hold(pair):
    for weights in ({"a.safetensors": 1e39}, {"a.safetensors": 1e308, "b.safetensors": -1e308}):
        with pytest.raises(onelora.AdapterFileError, match="the sum does not fit its dtype"):
            onelora.combine(weights, "c.safetensors")
    assert not Path("c.safetensors").exists()


def test_no_input_is_written_over(pair):
    convert_adapter("a.safetensors", "folder")
    save_file(base().state_dict(), "model.safetensors")
    before = {path: path.read_bytes() for path in pair.rglob("*.*") if path.is_file()}
    for out in ("a.safetensors", "./b.safetensors", "folder", "folder/adapter_model.safetensors", "."):
        with pytest.raises(onelora.ConfigError, match=r"would overwrite the input|is a folder that holds the input"):
            onelora.combine({"a.safetensors": 1, "b.safetensors": 1, "folder": 1}, out)
    with pytest.raises(onelora.ConfigError, match="would overwrite the input"):
        onelora.combine({"a.safetensors": 1}, "model.safetensors", trained="add", base="model.safetensors")
    assert {path: path.read_bytes() for path in pair.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None])
def test_a_damaged_adapter_is_refused_by_name(pair, content):
    path = Path("b.safetensors")
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.raises(onelora.AdapterFileError, match=r"b\.safetensors is not a safetensors file, or is damaged"):
        onelora.combine({"a.safetensors": 1, "b.safetensors": 1}, "c.safetensors")
    assert not Path("c.safetensors").exists()


def rewritten(path, **metadata):
    with safe_open(path, "pt") as file:
        header = file.metadata() | metadata
    save_file(load_file(path), path, header)


HUGE = "9" * 400
DIGEST = "0" * 64


@pytest.mark.parametrize(
    "parts",
    [
        "3",
        "[3]",
        '[["a"]]',
        f'[["x", "a", "{DIGEST}", true]]',
        f'[[NaN, "a", "{DIGEST}", true]]',
        f'[[Infinity, "a", "{DIGEST}", true]]',
        f'[[{HUGE}, "a", "{DIGEST}", true]]',
        '[[1, "a", "not hexadecimal", true]]',
        f'[[1, "a", "{DIGEST}\\n", true]]',
        "[" * 100_000,
    ],
)
def test_damaged_parts(pair, parts):
    rewritten("a.safetensors", parts=parts)
    with pytest.raises(onelora.AdapterFileError, match="damaged metadata"):
        onelora.read_adapter("a.safetensors")
