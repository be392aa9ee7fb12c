"""Keys, bundles that take signed adapters alone, and adapters on their way to them; made once for a test session."""

import functools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import bundles
import pytest
from bundles import active, call

from onelora_compile.exporters import bundle, sign_adapter

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs OpenSSL's command")


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def pair(place, name, *kind):
    """A private and a public key, of ed25519 if nothing is said."""
    private, public = Path(place) / f"{name}.pem", Path(place) / f"{name}.public.pem"
    openssl("genpkey", "-algorithm", *(kind or ("ed25519",)), "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    return private, public


@functools.cache
def own_keys():
    return pair(tempfile.mkdtemp(), "key")


@functools.cache
def _made(mode):
    place = Path(tempfile.mkdtemp())
    source = bundles.sources() / f"{mode}.onnx"
    return bundle(source, place / "b", verify_key=own_keys()[1], shapes=bundles.SHAPES).folder


def fresh(place, mode="input"):
    """A copy of a bundle with the key, to work on."""
    return Path(shutil.copytree(_made(mode), Path(place) / "b"))


def arrived(place, name="new", **options):
    """An adapter that was signed with the key and sent."""
    inbox = Path(place) / "inbox"
    inbox.mkdir(exist_ok=True)
    path = Path(shutil.copy(bundles.sources() / f"{name}.safetensors", inbox))
    sign_adapter(path, own_keys()[0], **options)
    return path


def kept(folder):
    """Everything that an update changes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def taken(folder):
    """The number and the hash of the newest update that a device has taken."""
    return json.loads((folder / "local" / "state.json").read_text())["taken"]


def refused(folder, *args, still="default"):
    """Nothing changed, and the message is for the caller."""
    before = kept(folder)
    assert call(folder, "update", *args) == 1
    assert kept(folder) == before
    assert active(folder) == still
