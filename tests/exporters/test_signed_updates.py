"""Adapters that arrive with a signature: made by `cryptography` or OpenSSL, verified by OpenSSL as a device does."""

import json
import os
import shutil

import bundles
import pytest
import signed
from bundles import active, call
from signed import kept, openssl, own_keys, pair, refused

import onelora_compile as onelora
from onelora_compile.exporters import bundle, sign_adapter

pytestmark = signed.needs_openssl


@pytest.fixture
def keys():
    return own_keys()


@pytest.fixture
def folder(tmp_path):
    return signed.fresh(tmp_path)


def made(place, key, mode="input", jetpack="6.2"):
    source = bundles.sources() / f"{mode}.onnx"
    return bundle(source, place / "b", verify_key=key, jetpack=jetpack, shapes=bundles.SHAPES).folder


@pytest.fixture
def arrived(tmp_path):
    (tmp_path / "inbox").mkdir()
    return shutil.copy(bundles.sources() / "new.safetensors", tmp_path / "inbox" / "new.safetensors")


def test_a_signed_adapter_is_taken_and_goes_back(folder, keys, arrived):
    assert sign_adapter(arrived, keys[0]) == arrived.with_name("new.safetensors.sig")
    assert "its signature, new.safetensors.sig" in (folder / "README.md").read_text()
    assert call(folder, "update", arrived) == 0
    assert active(folder) == "new"
    assert call(folder, "rollback") == 0
    assert active(folder) == "default"
    assert call(folder, "use", "new") == 0  # verified when it came


def test_the_signature_is_openssls_own(folder, keys, arrived, tmp_path):
    line, content, by_hand = b"onelora sequence 7\n", tmp_path / "content", tmp_path / "by-hand"
    content.write_bytes(line + arrived.read_bytes())
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", keys[0], "-in", content, "-out", by_hand)
    by_hand.write_bytes(line + by_hand.read_bytes())
    assert by_hand.read_bytes() == sign_adapter(arrived, keys[0], sequence=7).read_bytes()
    os.unlink(f"{arrived}.sig")
    assert call(folder, "update", arrived, "--signature", by_hand) == 0


def test_without_a_signature_nothing_changes(folder, arrived, capsys):
    refused(folder, arrived)
    assert "is not signed: there is no" in capsys.readouterr().err


def test_a_signature_by_another_key_changes_nothing(folder, arrived, tmp_path, capsys):
    sign_adapter(arrived, pair(tmp_path, "other")[0])
    refused(folder, arrived)
    assert "the signature is not by the key of this bundle, or the file or number is another" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["other", "cut", "longer", "bit"])
def test_another_file_under_a_signature_changes_nothing(damage, folder, keys, arrived, capsys):
    sign_adapter(arrived, keys[0])
    content = bytearray(arrived.read_bytes())
    content[-1] ^= 1
    other = (bundles.sources() / "c.safetensors").read_bytes()  # a good one that somebody else's signature came with
    arrived.write_bytes({"other": other, "cut": content[:-4], "longer": content + b"0", "bit": content}[damage])
    refused(folder, arrived)
    assert "the signature is not by the key of this bundle" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 63, 65])
def test_what_is_no_signature_changes_nothing(size, folder, arrived, capsys):
    arrived.with_name("new.safetensors.sig").write_bytes(bytes(size))
    refused(folder, arrived)
    assert "is no signature: ed25519 has 64 bytes" in capsys.readouterr().err


def test_a_signature_of_zeros_changes_nothing(folder, arrived):
    arrived.with_name("new.safetensors.sig").write_bytes(bytes(64))
    refused(folder, arrived)


OLD = """#!/bin/sh
[ "$1" = version ] && echo "OpenSSL 1.1.1f" && exit
echo "Option unknown option -rawin" >&2
exit 1
"""


def test_an_openssl_that_can_not_verify_changes_nothing(folder, keys, arrived, tmp_path, monkeypatch, capsys):
    """As 1.1.1 of JetPack 5 answers."""
    sign_adapter(arrived, keys[0])
    (tmp_path / "old").mkdir()
    old = tmp_path / "old" / "openssl"
    old.write_text(OLD)
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "old"))
    refused(folder, arrived)
    assert "OpenSSL 1.1.1f says: Option unknown option -rawin. ed25519 needs OpenSSL 3.0" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(folder, arrived)
    assert "the command `openssl` is needed" in capsys.readouterr().err


def test_a_bundle_without_a_key_takes_no_signature(keys, arrived, tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path / "plain")
    signature = sign_adapter(arrived, keys[0])
    refused(folder, arrived, "--signature", signature)
    assert "has no key to verify a signature with" in capsys.readouterr().err
    assert call(folder, "update", arrived) == 0


def test_keys_that_can_not_be_meant(keys, arrived, tmp_path):
    rsa, rsa_public = pair(tmp_path, "rsa", "rsa")
    for key, message in (
        (rsa, "no ed25519 key but a "),
        (keys[1], "is no private key in PEM"),
        (arrived, "openssl genpkey"),
    ):
        with pytest.raises(onelora.ConfigError, match=message):
            sign_adapter(arrived, key)
    assert not os.path.exists(f"{arrived}.sig")
    for key, mode, jetpack, message in (
        (rsa_public, "input", "6.2", "no ed25519 key but a "),
        (keys[0], "input", "6.2", "is no public key in PEM .* openssl pkey -in key.pem -pubout"),
        (keys[1], "input", "5.1", "JetPack 5.1 has OpenSSL 1.1.1"),
        (keys[1], "fold", "6.2", "mode 'fold' takes no adapter files"),
    ):
        with pytest.raises(onelora.ConfigError, match=message):
            made(tmp_path, key, mode, jetpack)
    assert not (tmp_path / "b").exists()


def test_the_private_key_stays_where_it_is(folder, keys):
    secret = keys[0].read_text().splitlines()[1].encode()
    assert not any(secret in content for content in kept(folder).values())
    assert json.loads((folder / "manifest.json").read_text())["update_key"] == keys[1].read_text()
