"""Adapter files (onelora_compile/weights/adapter_file.py) and whether one belongs to the model of this bundle.

A vector was trained for a certain base weight.  The file and the manifest both hold a fingerprint of each: 16 numbers
of a random projection, whose distance estimates the Frobenius distance of the weights.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import struct
from typing import Any, Dict, NamedTuple

from .folder import BundleError, Folder
from .tensors import Tensor, TensorError, read_safetensors

_FORMAT_VERSION = 1
_WIDTH = 4
# As in onelora_compile/weights/fingerprint.py; a test holds them equal.
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "output": 1e-2}
TOLERANCE_OTHER = 0.25
BASE = "base"  # the name of "no adapter": vectors of zeros
BUILT = "(built)"  # what a model with vectors that are refitted later is stored with

Vectors = Dict[str, Tensor]


def read_adapter(path: str, folder: Folder, sha256: str | None = None) -> Vectors:
    """What an adapter file gives the model, float32 by name: vectors, and the trained heads and norms that it takes.

    Args:
        path: the file.
        folder: the bundle whose model it is for.
        sha256: what the file's hash must be, if the sender said so.

    Raises:
        BundleError: damaged, of another base, of another model, or not to be used by swapping vectors alone.
    """
    try:
        if sha256 is not None:
            _check_hash(path, sha256)
        tensors, metadata = read_safetensors(path)
    except (TensorError, OSError) as error:
        raise BundleError(str(error)) from None
    if metadata.get("format") != "onelora":
        raise BundleError(f"{path} is a safetensors file, but not an adapter of onelora")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > _FORMAT_VERSION:
        raise BundleError(f"{path} has format version {version!r}; this script reads up to {_FORMAT_VERSION}")
    prints = _fingerprints(metadata, path)
    known: dict[str, list[int]] = folder.manifest["vectors"]
    trained = set(folder.manifest.get("trained", ()))
    constant: dict[str, str] = folder.manifest.get("constant", {})
    saved = {name: tensor for name, tensor in tensors.items() if name not in prints}
    held = {name for name in set(saved) - set(known) if not _same(name, saved[name], constant.get(name))}
    _check_names(path, (set(prints) & set(tensors)) - set(constant), set(known) - trained, held)
    if absent := sorted(trained - set(saved)):
        raise BundleError(f"{path} has no trained values for {_shortened(absent)}")
    for name, shape in known.items():
        value = tensors[name]
        kind = "trained tensor" if name in trained else "vector"
        floating = value.dtype.startswith(("float", "bfloat")) if name in trained else value.dtype == "float32"
        if list(value.shape) != list(shape) or not floating:
            raise BundleError(
                f"{path}: the {kind} {name!r} is {value.dtype} {list(value.shape)}; the model takes float32 {shape}"
            )
        if not value.is_finite():
            raise BundleError(f"{path}: NaN or infinity in {name!r}: its training diverged")
    _check_base(path, prints, folder.manifest["fingerprints"])
    return {name: tensors[name].to("float32") for name in known}


def _same(name: str, value: Tensor, digest: str | None) -> bool:
    """Whether the model does without a tensor of the file, or holds it as it is: as `Metadata` of the package notes."""
    if digest is None or digest == "":
        return digest == ""
    numbers = [float(number) for number in value.values()]
    raw = Tensor.from_values("float32", value.shape, numbers).data
    return hashlib.sha256(name.encode() + raw).hexdigest() == digest


def zeros(folder: Folder) -> Vectors:
    """The vectors of no adapter."""
    shapes: dict[str, list[int]] = folder.manifest["vectors"]
    return {name: Tensor("float32", shape, bytes(4 * math.prod(shape))) for name, shape in shapes.items()}


def vectors_of(folder: Folder, adapter: dict[str, Any]) -> Vectors:
    """The vectors of an adapter of the state or of the manifest, checked against the hash that is noted there."""
    if adapter["name"] == BASE:
        return zeros(folder)
    return read_adapter(folder.file(*str(adapter["file"]).split("/")), folder, adapter["sha256"])


def _check_hash(path: str, sha256: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != sha256.lower():
        raise BundleError(f"{path} is damaged or another file: its SHA-256 is {found}, expected {sha256.lower()}")


def _check_names(path: str, found: set[str], known: set[str], saved: set[str]) -> None:
    if more := sorted(found - known):
        raise BundleError(f"{path} has vectors that the model has no place for: {_shortened(more)}")
    if absent := sorted(known - found):
        raise BundleError(f"{path} has no vectors for {_shortened(absent)}")
    if saved:
        raise BundleError(
            f"{path} also trained {_shortened(sorted(saved))} (modules_to_save, train_norms), which the model holds as "
            "constants: a new bundle is needed for it"
        )


class Fingerprint(NamedTuple):
    """What is known of a base weight: as in onelora_compile/weights/fingerprint.py."""

    shape: tuple[int, ...]
    dtype: str
    norm: float
    sketch: tuple[float, ...]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Fingerprint:
        """Read what `to_json` of the package wrote.

        Raises:
            ValueError: not such values.
        """
        try:
            raw = base64.b64decode(fields["sketch"], validate=True)
            sketch = struct.unpack(f"<{_WIDTH * _WIDTH}f", raw)
            rows, columns = (int(size) for size in fields["shape"])
            norm, dtype = float(fields["norm"]), fields["dtype"]
        except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise ValueError(f"no fingerprint: {error!r}") from None
        if not all(map(math.isfinite, (norm, *sketch))) or norm < 0 or not isinstance(dtype, str):
            raise ValueError("no fingerprint: not finite, or without a dtype")
        return cls((rows, columns), dtype, norm, sketch)

    def distance(self, other: Fingerprint) -> float:
        """Estimated Frobenius distance over the larger norm."""
        if self.shape != other.shape:
            return math.inf
        scale = max(self.norm, other.norm)
        gap = math.sqrt(sum((a - b) ** 2 for a, b in zip(self.sketch, other.sketch)))
        return gap / _WIDTH / scale if scale else 0.0


def _fingerprints(metadata: dict[str, str], path: str) -> dict[str, Fingerprint]:
    try:
        found = json.loads(metadata["fingerprints"])
        return {str(name): Fingerprint.of(fields) for name, fields in found.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: damaged metadata: {error!r}") from None


def _check_base(path: str, found: dict[str, Fingerprint], known: dict[str, Any]) -> None:
    wrong = []
    for name, fields in known.items():
        here, other = Fingerprint.of(fields), found[name]
        distance = here.distance(other)
        if distance > max(TOLERANCE.get(one.dtype, TOLERANCE_OTHER) for one in (here, other)):
            share = "<0.1%" if distance < 0.0005 else f"{distance:.1%}"  # nothing that is refused differs by 0.0%
            wrong.append(f"{name} (differs by {share})")
    if wrong:
        raise BundleError(f"{path} was trained on another base: {_shortened(wrong)}")


def _shortened(names: list[str], most: int = 5) -> str:
    more = f", … ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_bytes(path: str) -> bytes:
    """The content of an adapter file that is to be installed."""
    if not os.path.isfile(path):
        raise BundleError(f"there is no file {path}")
    with open(path, "rb") as file:
        return file.read()
