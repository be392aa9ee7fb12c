"""Signatures of adapter files: ed25519 over a line with the update's number and the file's bytes, in a file beside it.

The private key stays on the workstation.  A bundle carries the public one; OpenSSL's command verifies on the device.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from onelora_compile.errors import ConfigError, require
from onelora_compile.exporters.jetson.device.folder import BundleError, name_of
from onelora_compile.exporters.jetson.device.signature import LARGEST_SEQUENCE, SUFFIX, head
from onelora_compile.exporters.jetson.fit_model import Fitted
from onelora_compile.exporters.jetson.releases import JetPack
from onelora_compile.file_names import as_path, check_there
from onelora_compile.weights.adapter_file import read_adapter
from onelora_compile.weights.atomic_write import refuse_overwriting, replacing

PathLike = str | os.PathLike[str]


def sign_adapter(path: PathLike, key: PathLike, *, sequence: int | None = None) -> Path:
    """Sign an adapter file for devices whose bundle has the public key.

    A device refuses what was signed with a smaller number than it has taken, so an old update that is sent once more
    changes nothing. To go back to an old adapter, sign it again.

    Args:
        path: an adapter file (.safetensors).
        key: the private key, ed25519 in PEM without a password: `openssl genpkey -algorithm ed25519 -out key.pem`.
        sequence: the number of the update, 1 to 999999999999999999, larger than any before for the same devices;
            None is the time in microseconds since 1970 (UTC).

    Returns:
        The signature's file, `path` and ".sig", which is written or replaced in one step.

    Raises:
        ConfigError: no such key, no such number, or a file's name that a device would refuse.
        AdapterFileError: no adapter file, or a damaged one.
        MissingExtraError: without the extra `sign`.
        OSError: a file can't be read or written.
    """
    file, place = as_path(path, "path"), as_path(key, "key")
    # No other place has to be asked for the time, and a loop gives each update its own.
    line = head(_checked(time.time_ns() // 1000 if sequence is None else sequence))
    check_there(file)
    try:
        name_of(str(file))
    except BundleError as error:
        raise ConfigError(str(error)) from None
    read_adapter(file)
    private = _loaded(place, "private")
    out = file.with_name(file.name + SUFFIX)
    refuse_overwriting(out, [file, place])
    with replacing(out) as beside:
        beside.write_bytes(line + private.sign(line + file.read_bytes()))
    return out


def sequence_of(signature: Path) -> int:
    """The number of the update that a file of `sign_adapter` begins with."""
    return int(signature.read_bytes().partition(b"\n")[0].split()[-1])


def _checked(sequence: int) -> int:
    if isinstance(sequence, bool) or not isinstance(sequence, int) or not 1 <= sequence <= LARGEST_SEQUENCE:
        raise ConfigError(f"sequence must be a whole number from 1 to {LARGEST_SEQUENCE}, not {sequence!r}")
    return sequence


def public_key_of(path: PathLike, fitted: Fitted, jetpack: JetPack) -> str:
    """The public key that a bundle is made with, in PEM.

    Raises:
        ConfigError: no such key, a model that takes no adapter files, or a JetPack that can't verify.
    """
    if not fitted.traits.takes_files:
        raise ConfigError(
            f"verify_key: a model of mode {fitted.mode!r} takes no adapter files, so there is nothing to verify"
        )
    if not jetpack.verifies:
        raise ConfigError(
            f"verify_key: JetPack {jetpack.version} has OpenSSL 1.1.1, whose command can't verify ed25519 (3.0 can, "
            "JetPack 6.0 and newer): verify the file before `update` there, and give its --sha256"
        )
    public = _loaded(as_path(path, "verify_key"), "public")
    serialization = require("cryptography.hazmat.primitives.serialization", "sign", "verify signatures")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(public.public_bytes(serialization.Encoding.PEM, form).decode())


def _loaded(path: Path, kind: str) -> Any:
    serialization = require("cryptography.hazmat.primitives.serialization", "sign", "sign and verify adapters")
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", "sign", "sign and verify adapters")
    check_there(path)
    content = path.read_bytes()
    try:
        if kind == "private":
            found = serialization.load_pem_private_key(content, password=None)
        else:
            found = serialization.load_pem_public_key(content)
    except (ValueError, TypeError) as error:  # another kind of file, and a key with a password
        raise ConfigError(f"{path} is no {kind} key in PEM without a password: {error}. {_MADE[kind]}") from error
    if not isinstance(found, ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey):
        raise ConfigError(f"{path} is no ed25519 key but a {type(found).__name__}. {_MADE[kind]}")
    return found


_MADE = {
    "private": "One is made by: openssl genpkey -algorithm ed25519 -out key.pem",
    "public": "It is taken from the private key by: openssl pkey -in key.pem -pubout -out public.pem",
}
