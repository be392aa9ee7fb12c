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
from adapter_files import saved
from command_line import run
from huggingface_hub import constants
from safetensors.torch import load_file

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

OURS, CONFIG, TENSORS = "onelora.safetensors", "adapter_config.json", "adapter_model.safetensors"
FILES = {"onelora": {OURS}, "peft": {CONFIG, TENSORS}, "peft-miss": {CONFIG, TENSORS}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, nobody logged in, offline, and a folder to work in."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    """The same, with a Hub: HF_ENDPOINT is read once, when huggingface_hub is imported."""
    with hub_double.running() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield found


@pytest.fixture
def trained(tmp_path):
    return saved(tmp_path)  # base, model, its file, inputs


def cached(cache, name, files, sha="a" * 40, revision="main"):
    """A repository in the cache, as huggingface_hub documents its layout: blobs, refs, snapshots of links."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / sha
    for place in (repository / "blobs", repository / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(sha)
    for path, content in files.items():
        blob = repository / "blobs" / path.replace("/", "-")
        blob.write_bytes(content)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))


def in_cache(cache, name, path, **options):
    path = Path(path)
    found = {one.name: one.read_bytes() for one in path.iterdir()} if path.is_dir() else {OURS: path.read_bytes()}
    cached(cache, name, found, **options)


def assert_same_vectors(found, model):
    expected = onelora.vectors(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], vector) for name, vector in expected.items())


def push(model, name="owner/a", **options):
    return onelora.push_to_hub(model, name, token=hub_double.TOKEN, **options)


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


def test_a_pickle_alone_is_no_adapter(hub, trained, tmp_path):
    onelora.save_adapter(trained[1], tmp_path / "a", format="peft")
    (tmp_path / "a" / TENSORS).rename(tmp_path / "a" / "adapter_model.bin")
    hub.holds("user/name", tmp_path / "a")
    with pytest.raises(onelora.AdapterFileError, match=r"pickles are not opened.*adapter_model\.bin"):
        onelora.read_adapter("user/name")


def test_a_base_is_no_adapter_and_the_message_lists_what_is_there(hub, trained, tmp_path):
    hub.holds("user/base", tmp_path, into="adapters/one/")  # holds a.safetensors
    with pytest.raises(onelora.AdapterFileError, match=r"holds no adapter: neither .*adapters/one/a\.safetensors"):
        onelora.load_adapter(trained[0], "user/base")
    with pytest.raises(onelora.AdapterFileError, match="holds no adapter in other"):
        onelora.load_adapter(trained[0], "user/base", subfolder="other")


def test_another_base_is_refused_and_left_as_it_was(hub, trained):
    push(trained[1])
    other = copy.deepcopy(trained[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(onelora.BaseMismatchError, match="owner/a"):
        onelora.load_adapter(other, "owner/a")
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("user/nothing", r"Hub does not give a repository of that id.*(Repository|authenticated)"),
        ("user/name..x", r"Hub does not give.*Cannot have -- or \.\."),
        ("runs/a.safetensors", "there is no adapter file runs/a.safetensors$"),
        ("./runs/best", "there is no adapter file runs/best$"),
        ("runs/best/a", "there is no adapter file runs/best/a$"),
        ("best", "there is no adapter file best$"),
    ],
)
def test_what_is_neither_here_nor_there(name, why, hub, trained):
    with pytest.raises(FileNotFoundError, match=why) as caught:
        onelora.load_adapter(trained[0], name)
    assert name.removeprefix("./") in str(caught.value)
    assert bool(hub.requests) == (name == "user/nothing")


def test_offline_without_a_copy(cache, trained):
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder user/name, and the Hugging Face Hub.*HF_HUB_OFFLINE"
    ):
        onelora.load_adapter(trained[0], "user/name")


def test_a_hub_that_is_down_gives_what_is_in_the_cache_or_says_so(hub, trained):
    push(trained[1])
    onelora.read_adapter("owner/a")
    hub.down = True
    assert_same_vectors(onelora.read_adapter("owner/a").vectors, trained[1])
    with pytest.raises(FileNotFoundError, match=r"owner/b.*503"):
        onelora.read_adapter("owner/b")
    with pytest.raises(onelora.HubError, match=r"owner/a was not pushed.*503"):
        push(trained[1])


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


@pytest.mark.parametrize("subfolder", ["../b", "/b", "a/../../b"])
def test_a_subfolder_stays_inside(subfolder, cache):
    for name in ("user/name", "."):
        with pytest.raises(onelora.ConfigError, match="leads out of the folder"):
            onelora.read_adapter(name, subfolder=subfolder)


NO_IDS = ["name", "a/b/c", "owner/a.safetensors", "../a", "", None, Path("owner/a"), "owner/a b"]


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_id_is_not_pushed(name, hub, trained):
    with pytest.raises(onelora.ConfigError, match="is no id"):
        push(trained[1], name)
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "token", "why"),
    [("owner/a", None, "401"), ("owner/a", "hf_other", "401"), ("stranger/a", hub_double.TOKEN, "403.*stranger")],
)
def test_a_push_that_is_refused_is_one_error(name, token, why, hub, trained):
    with pytest.raises(onelora.HubError, match=rf"{name} was not pushed.*{why}"):
        onelora.push_to_hub(trained[1], name, token=token)
    assert name not in hub.repositories


def test_a_card_that_the_hub_refuses_changes_nothing_there(hub, trained):
    push(trained[1])
    before = hub.files("owner/a")
    with pytest.raises(onelora.HubError, match="not a valid model id"):
        push(trained[1], card="---\nbase_model: /home/me/base\n---\n")
    assert hub.files("owner/a") is before


def test_a_push_offline_is_one_error(cache, trained):
    with pytest.raises(onelora.HubError, match=r"owner/a was not pushed.*offline"):
        onelora.push_to_hub(trained[1], "owner/a")


def test_what_can_not_be_saved_is_not_pushed(hub, trained):
    with pytest.raises(onelora.ConfigError, match="format='gguf'"):
        push(trained[1], format="gguf")
    with pytest.raises(onelora.StateError, match="was not given to adapt"):
        push(trained[0])
    next(iter(onelora.vectors(trained[1]).values())).data.fill_(float("nan"))
    with pytest.raises(onelora.AdapterFileError, match="NaN"):
        push(trained[1])
    assert not hub.requests


def test_commands_take_an_id(cache, trained, tmp_path):
    in_cache(cache, "user/name", trained[2])
    shown = run("inspect", "user/name", "--json")
    assert json.loads(shown.stdout)["numbers"] == sum(v.numel() for v in onelora.vectors(trained[1]).values())
    assert run("convert", "user/name", "-o", "b.safetensors").exit_code == 0
    assert_same_vectors(onelora.read_adapter("b.safetensors").vectors, trained[1])


def test_a_device_and_a_signature_want_files(cache, trained, tmp_path):
    from onelora_compile.exporters import sign_adapter

    in_cache(cache, "user/name", trained[2])
    with pytest.raises(FileNotFoundError, match="there is no file user/name"):
        sign_adapter("user/name", tmp_path / "key.pem")


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


def test_without_huggingface_hub(trained):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import torch, onelora_compile as onelora\n"
        "model = onelora.adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)))\n"
        "for call in (onelora.load_adapter, onelora.push_to_hub, onelora.model_card):\n"
        "    try: call(model, 'user/name')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kinds = ["FileNotFoundError there is no file or folder user/name", "MissingExtraError", "MissingExtraError"]
    for line, kind in zip(done.stdout.splitlines(), kinds, strict=True):
        assert line.startswith(kind)
        assert "pip install 'onelora-compile[hf]'" in line


def test_the_cards_of_pushed_adapters_are_read_back_from_the_hub(hub, trained):
    push(trained[1], format="peft")
    card = huggingface_hub.ModelCard.load("owner/a")
    assert card.data.library_name == "peft"
    assert 'onelora.load_adapter(model, "owner/a")' in card.text
