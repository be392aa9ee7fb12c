"""Where adapters of the Hub are: a Hub on this machine, and its cache."""

import os
from pathlib import Path

import hub_double
import pytest
import torch
from adapter_files import saved
from huggingface_hub import constants

import onelora_compile as onelora

OURS, CONFIG, TENSORS = "onelora.safetensors", "adapter_config.json", "adapter_model.safetensors"


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


def push(model, name="owner/a", **options):
    return onelora.push_to_hub(model, name, token=hub_double.TOKEN, **options)


def assert_same_vectors(found, model):
    expected = onelora.vectors(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], vector) for name, vector in expected.items())
