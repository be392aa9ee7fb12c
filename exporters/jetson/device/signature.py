"""Whether an adapter file was signed by whoever made the bundle: ed25519, verified by OpenSSL's command.

JetPack 6 has OpenSSL 3.0, which verifies it by `pkeyutl -rawin`; 1.1.1 of JetPack 5 does not know that option.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

from .folder import BundleError, Folder

SUFFIX = ".sig"  # of a signature's file, behind the whole name of what it signs
_LENGTH = 64  # bytes


def check_signature(folder: Folder, path: str, content: bytes, signature: str | None = None) -> None:
    """Refuse the content of an adapter file that is not signed by the key of the bundle, if that has one.

    Args:
        folder: the bundle.
        path: where the content came from, for messages.
        content: what is verified, and what is to be installed.
        signature: the signature's file; None is the one beside `path`.

    Raises:
        BundleError: no signature, a wrong one, one that nothing could verify, or one for a bundle without a key.
    """
    key = folder.manifest.get("update_key")
    if not key:
        if signature is not None:
            raise BundleError("this bundle has no key to verify a signature with: make it with verify_key=")
        return
    place = signature or path + SUFFIX
    if not os.path.isfile(place):
        raise BundleError(f"{path} is not signed: there is no {place}, and this bundle takes signed adapters alone")
    with open(place, "rb") as file:
        signed = file.read(_LENGTH + 1)
    if len(signed) != _LENGTH:
        raise BundleError(f"{place} is no signature: ed25519 has {_LENGTH} bytes")
    _verify(str(key).encode(), content, signed, path)


def _verify(key: bytes, content: bytes, signed: bytes, path: str) -> None:
    command = shutil.which("openssl")
    if command is None:
        raise BundleError("the command `openssl` is needed to verify signatures (3.0 or newer): apt install openssl")
    # From copies that nobody else can write to: what is verified is what was read.
    with tempfile.TemporaryDirectory() as place:
        files = {name: os.path.join(place, name) for name in ("key", "content", "signed")}
        for name, data in (("key", key), ("content", content), ("signed", signed)):
            with open(files[name], "wb") as file:
                file.write(data)
        words = ["-pubin", "-inkey", files["key"], "-in", files["content"], "-sigfile", files["signed"]]
        done = subprocess.run(
            [command, "pkeyutl", "-verify", "-rawin", *words],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        return
    if "Signature Verification Failure" in done.stdout + done.stderr:
        raise BundleError(f"{path}: the signature is not by the key of this bundle, or the file is another one")
    version = subprocess.run([command, "version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    raise BundleError(
        f"{path} can't be verified, {version.strip() or command} says: {(done.stderr or done.stdout).strip()[-300:]}. "
        "ed25519 needs OpenSSL 3.0 or newer"
    )
