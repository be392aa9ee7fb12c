"""Adapters on the Hugging Face Hub: huggingface_hub itself, against a Hub on this machine and against its cache."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import hub_double
import huggingface_hub
import peft
import peft_folders
import pytest
import torch
import zoo
from command_line import run
from hub_places import CONFIG, OURS, TENSORS, assert_same_vectors, cached, in_cache, push
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

FILES = {"onelora": {OURS}, "peft": {CONFIG, TENSORS}, "peft-miss": {CONFIG, TENSORS}}


@pytest.mark.parametrize("format", list(FILES))
def test_what_is_pushed_is_loaded_bit_for_bit(format, hub, trained):
    base, model, _, inputs = trained
    commit = push(model, format=format)
    assert set(hub.files("owner/a")) == {*FILES[format], "README.md"}
    assert len(hub.repositories["owner/a"].commits) == 2  # one commit on the empty repository: no state between
    again = onelora.load_adapter(copy.deepcopy(base), "owner/a")
    assert_same_vectors(onelora.vectors(again), model)
    assert torch.equal(zoo.logits(again(**inputs)), zoo.logits(model(**inputs)))
    assert_same_vectors(onelora.read_adapter("owner/a", revision=commit.oid).vectors, model)
    assert set(onelora.read_adapter("owner/a").fingerprints) == set(onelora.vectors(model))  # in each format
    asked = len(hub.requests)
    constants.HF_HUB_OFFLINE = True  # the fixture puts it back
    assert_same_vectors(onelora.read_adapter("owner/a").vectors, model)
    assert len(hub.requests) == asked


def test_peft_reads_what_was_pushed_by_its_id(hub, trained):
    base, model, _, inputs = trained
    push(model, format="peft")
    onelora.read_adapter("owner/a")
    constants.HF_HUB_OFFLINE = True  # PEFT asks by functions that were bound to the Hub's address at their import
    theirs = peft_folders.loaded(copy.deepcopy(base), "owner/a")
    torch.testing.assert_close(zoo.logits(theirs(**inputs)), zoo.logits(model(**inputs)))


def test_another_push_takes_the_place_of_the_first_in_any_format(hub, trained):
    _, model, _, _ = trained
    push(model, format="peft")
    fill_vectors(model, 0.25)
    with pytest.warns(onelora.OneLoRAWarning, match="owner/a has a README.md, which stays"):
        commit = push(model, commit_message="a quarter")
    assert set(hub.files("owner/a")) == {OURS, "README.md"}
    assert hub.repositories["owner/a"].messages == ["initial commit", "1LoRA adapter, format peft", "a quarter"]
    assert commit.commit_url == f"{hub.url}/owner/a/commit/{commit.oid}"
    assert_same_vectors(onelora.read_adapter("owner/a").vectors, model)
    first = onelora.read_adapter("owner/a", revision=list(hub.repositories["owner/a"].commits)[1])
    assert not any(torch.equal(vector, onelora.vectors(model)[name]) for name, vector in first.vectors.items())


def test_what_else_is_in_the_repository_stays(hub, trained, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    (tmp_path / "files" / "notes.txt").write_text("mine")
    hub.holds("owner/a", tmp_path / "files")
    with pytest.warns(onelora.OneLoRAWarning, match="which stays"):
        push(trained[1])
    held = hub.files("owner/a")
    assert held["README.md"].endswith(b"mine")
    assert held["notes.txt"] == b"mine"
    push(trained[1], card="---\nlicense: mit\n---\nby hand")
    assert hub.files("owner/a")["README.md"].endswith(b"by hand")


def test_branches_private_repositories_and_named_adapters(hub, trained):
    _, model, _, _ = trained
    onelora.add_adapter(model, "other")
    push(model, private=True, revision="v2", adapter_name="other")
    assert hub.repositories["owner/a"].private
    assert hub.files("owner/a") == {}
    with pytest.raises(FileNotFoundError, match=r"owner/a.*(authenticated|private)"):
        onelora.read_adapter("owner/a", revision="v2")
    found = onelora.read_adapter("owner/a", revision="v2", token=hub_double.TOKEN)
    assert not any(vector.any() for vector in found.vectors.values())
    with pytest.raises(onelora.AdapterFileError, match=r"owner/a on the Hugging Face Hub holds no adapter.*holds none"):
        onelora.read_adapter("owner/a", token=hub_double.TOKEN)
    with pytest.raises(FileNotFoundError, match="revision 'v3'"):
        onelora.read_adapter("owner/a", revision="v3", token=hub_double.TOKEN)


@pytest.mark.parametrize("format", list(FILES))
@pytest.mark.parametrize("subfolder", [None, "adapters/a"])
def test_the_cache_alone_is_enough(format, subfolder, cache, trained, tmp_path):
    base, model, path, _ = trained
    if format != "onelora":
        onelora.save_adapter(model, path := tmp_path / "folder", format=format)
    files = {one.name: one.read_bytes() for one in path.iterdir()} if path.is_dir() else {OURS: path.read_bytes()}
    cached(cache, "user/name", {f"{subfolder}/{name}" if subfolder else name: held for name, held in files.items()})
    again = onelora.load_adapter(copy.deepcopy(base), "user/name", subfolder=subfolder)
    assert_same_vectors(onelora.vectors(again), model)


def test_revisions_in_the_cache(cache, trained, tmp_path):
    _, model, path, _ = trained
    in_cache(cache, "user/name", path)
    onelora.save_adapter(fill_vectors(model, 0.25), tmp_path / "b.safetensors")
    in_cache(cache, "user/name", tmp_path / "b.safetensors", sha="b" * 40, revision="v2")
    assert_same_vectors(onelora.read_adapter("user/name", revision="v2").vectors, model)
    assert_same_vectors(onelora.read_adapter("user/name", revision="b" * 40).vectors, model)


def test_what_peft_pushed_is_loaded_with_the_warning_that_it_knows_no_base(hub, tmp_path):
    base, _ = zoo.bert()
    peft_folders.written(copy.deepcopy(base), tmp_path / "theirs", peft.MissConfig(r=1))
    hub.holds("user/theirs", tmp_path / "theirs")
    with pytest.warns(onelora.OneLoRAWarning, match="user/theirs has no fingerprints"):
        model = onelora.load_adapter(base, "user/theirs")
    stored = load_file(tmp_path / "theirs" / TENSORS)
    assert all(torch.equal(stored[f"base_model.model.{n}.miss_block"][0], v) for n, v in onelora.vectors(model).items())


def test_only_fixed_names_are_asked_for(hub, trained, tmp_path):
    """What else a repository holds, weights and pickles, is not downloaded."""
    onelora.save_adapter(trained[1], tmp_path / "a", format="peft")
    for name in ("adapter_model.bin", "model.safetensors", "evil.py", "onelora.safetensors.index.json"):
        (tmp_path / "a" / name).write_text("no")
    hub.holds("user/name", tmp_path / "a")
    onelora.read_adapter("user/name")
    assert {Path(path).name for _, path in hub.requests if "/resolve/" in path} == {CONFIG, TENSORS}


@pytest.mark.parametrize("besides", [[], [CONFIG, TENSORS], [OURS]], ids=["alone", "peft", "ours"])
def test_a_lora_of_diffusers_is_read_where_there_is_nothing_else(besides, hub, trained, tmp_path):
    folder = tmp_path / "a"
    onelora.save_adapter(trained[1], folder, format="peft")
    tensors = {name.removeprefix("base_model.model."): one for name, one in load_file(folder / TENSORS).items()}
    save_file({name: 2 * one for name, one in tensors.items()}, folder / "pytorch_lora_weights.safetensors")
    onelora.save_adapter(trained[1], folder / OURS)
    for name in {CONFIG, TENSORS, OURS} - set(besides):
        (folder / name).unlink()
    hub.holds("user/name", folder)
    factor = 1 if besides else 4  # both factors of the LoRA are twice as large
    for found in (onelora.read_adapter("user/name"), onelora.read_adapter(folder)):
        for name, vector in onelora.vectors(trained[1]).items():
            assert torch.equal(found.vectors[name], factor * vector)


def test_what_is_here_comes_before_the_hub(hub, trained):
    Path("user").mkdir()
    onelora.save_adapter(trained[1], "user/name", format="peft")
    assert_same_vectors(onelora.read_adapter("user/name").vectors, trained[1])
    assert not hub.requests
    with pytest.raises(onelora.ConfigError, match=r"revision='v2'.*user/name is here"):
        onelora.read_adapter("user/name", revision="v2")


def test_a_downloaded_folder_and_a_checkpoint_are_read_as_they_are(trained, tmp_path):
    (tmp_path / "x" / "b").mkdir(parents=True)
    onelora.save_adapter(trained[1], tmp_path / "x" / "b" / OURS)
    assert_same_vectors(onelora.read_adapter(tmp_path / "x" / "b").vectors, trained[1])
    assert_same_vectors(onelora.read_adapter(tmp_path / "x", subfolder="b").vectors, trained[1])


def test_commands_take_an_id(cache, trained, tmp_path):
    in_cache(cache, "user/name", trained[2])
    shown = run("inspect", "user/name", "--json")
    assert json.loads(shown.stdout)["numbers"] == sum(v.numel() for v in onelora.vectors(trained[1]).values())
    assert run("convert", "user/name", "-o", "b.safetensors").exit_code == 0
    assert_same_vectors(onelora.read_adapter("b.safetensors").vectors, trained[1])


def test_in_a_process_that_has_imported_nothing_else(hub, tmp_path):
    """huggingface_hub finds its own modules at their first use, and reads the environment once."""
    code = (
        "import torch, onelora_compile as onelora\n"
        "model = onelora.adapt(torch.nn.Sequential(torch.nn.Linear(2, 3)))\n"
        "torch.nn.init.normal_(onelora.vectors(model)['0'])\n"
        "expected = onelora.vectors(model)['0'].detach().clone()\n"
        "onelora.push_to_hub(model, 'owner/a')\n"
        "onelora.load_adapter(onelora.detach(model), 'owner/a')\n"
        "assert torch.equal(onelora.vectors(model)['0'], expected)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub_double.TOKEN}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"onelora_compile" in hub.files("owner/a")["README.md"]


def test_the_cards_of_pushed_adapters_are_read_back_from_the_hub(hub, trained):
    push(trained[1], format="peft")
    card = huggingface_hub.ModelCard.load("owner/a")
    assert card.data.library_name == "peft"
    assert 'onelora.load_adapter(model, "owner/a")' in card.text
