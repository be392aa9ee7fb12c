"""Whether an adapter file was signed by whoever made the bundle: ed25519, verified by OpenSSL's command.

JetPack 6 has OpenSSL 3.0, which verifies it by `pkeyutl -rawin`; 1.1.1 of JetPack 5 does not know that option.
A signature's file is a line with the update's sequence number and 64 bytes, which sign that line and the adapter file
behind it.  One of 64 bytes alone signs the adapter file and has no number: OpenSSL by itself writes it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile

from .folder import BundleError, Folder

SUFFIX = ".sig"  # of a signature's file, behind the whole name of what it signs
LARGEST_SEQUENCE = 10**18 - 1  # sequence number: of 18 digits
# No adapter file begins as the line does: read as the length of its header it is 2e18 bytes.
_FORM = re.compile(rb"(?:onelora sequence ([1-9][0-9]{0,17})\n)?(.{64})", re.DOTALL)
_LONGEST = 128  # bytes, and more than the form allows


def head(sequence: int) -> bytes:
    """The line with an update's number: the beginning of its signature's file, and of what is signed."""
    return b"onelora sequence %d\n" % sequence


def check_signature(folder: Folder, path: str, content: bytes, signature: str | None = None) -> int | None:
    """Refuse the content of an adapter file that is not signed by the key of the bundle, if that has one.

    Args:
        folder: the bundle.
        path: where the content came from, for messages.
        content: what is verified, and what is to be installed.
        signature: the signature's file; None is the one beside `path`.

    Returns:
        The sequence number that was signed with the content; None if there is none.

    Raises:
        BundleError: no signature, a wrong one, one that nothing could verify, or one for a bundle without a key.
    """
    key = folder.manifest.get("update_key")
    if not key:
        if signature is not None:
            raise BundleError("this bundle has no key to verify a signature with: make it with verify_key=")
        return None
    place = signature or path + SUFFIX
    if not os.path.isfile(place):
        raise BundleError(f"{path} is not signed: there is no {place}, and this bundle takes signed adapters alone")
    with open(place, "rb") as file:
        found = _FORM.fullmatch(file.read(_LONGEST))
    if found is None:
        raise BundleError(f"{place} is no signature: ed25519 has 64 bytes, behind a line with a sequence number")
    sequence = int(found[1]) if found[1] else None
    signed = content if sequence is None else head(sequence) + content
    _verify(str(key).encode(), signed, found[2], path)
    return sequence


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
        raise BundleError(f"{path}: the signature is not by the key of this bundle, or the file or number is another")
    version = subprocess.run([command, "version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    raise BundleError(
        f"{path} can't be verified, {version.strip() or command} says: {(done.stderr or done.stdout).strip()[-300:]}. "
        "ed25519 needs OpenSSL 3.0 or newer"
    )
