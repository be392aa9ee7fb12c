"""What a model file says about its vectors: entries `onelora.…` of ONNX `metadata_props`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np

from onelora_compile.checkpoint import AdapterFile
from onelora_compile.errors import AdapterFileError, BaseMismatchError
from onelora_compile.fingerprint import Fingerprint
from onelora_compile.text import shortened
from onelora_compile.version import __version__

_KEY = "onelora."


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The vectors of an ONNX model.

    Attributes:
        mode: "fold", "load", "input", "bank", or "base" for a model without vectors.
        vectors: shape of each vector that the graph uses, by name.
        fingerprints: of the base weights, by the same names.
        adapters: names of the adapters: those of a bank by id, of mode "fold" those that were folded, if known.
        sha256: of the vectors that the file was written with, "" for a base.
        producer: what wrote it.
    """

    mode: str = "base"
    vectors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    fingerprints: Mapping[str, Fingerprint] = dataclasses.field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    sha256: str = ""
    producer: str = f"onelora-compile {__version__}"

    def to_props(self) -> dict[str, str]:
        """As entries of `metadata_props`."""
        return {
            f"{_KEY}mode": self.mode,
            f"{_KEY}vectors": json.dumps({name: list(shape) for name, shape in self.vectors.items()}),
            f"{_KEY}fingerprints": json.dumps({name: one.to_json() for name, one in self.fingerprints.items()}),
            f"{_KEY}adapters": json.dumps(list(self.adapters)),
            f"{_KEY}adapter_sha256": self.sha256,
            f"{_KEY}producer": self.producer,
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str], path: str) -> Metadata:
        """Read `to_props` output; a model without these entries is a base.

        Raises:
            AdapterFileError: the entries are damaged.
        """
        own = {key.removeprefix(_KEY): value for key, value in props.items() if key.startswith(_KEY)}
        if not own:
            return cls(producer="")
        try:
            return cls(
                mode=own["mode"],
                vectors={str(name): tuple(map(int, shape)) for name, shape in json.loads(own["vectors"]).items()},
                fingerprints={
                    str(name): Fingerprint.from_json(fields)
                    for name, fields in json.loads(own.get("fingerprints", "{}")).items()
                },
                adapters=tuple(map(str, json.loads(own.get("adapters", "[]")))),
                sha256=own.get("adapter_sha256", ""),
                producer=own.get("producer", ""),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise AdapterFileError(f"{path}: damaged onelora metadata: {error!r}") from error

    def check_fits(self, file: AdapterFile, path: str) -> None:
        """Whether an adapter belongs to this model.

        Raises:
            AdapterFileError: it has other vectors, or other shapes.
            BaseMismatchError: it was trained on another base.
        """
        if missing := sorted(set(file.vectors) - set(self.vectors)):
            raise AdapterFileError(
                f"{path} has no place for vectors of the adapter: {shortened(missing)}; it has "
                f"{shortened(self.vectors)}"
            )
        if absent := sorted(set(self.vectors) - set(file.vectors)):
            raise AdapterFileError(f"the adapter has no vectors for {shortened(absent)} of {path}")
        wrong = [name for name, shape in self.vectors.items() if tuple(file.vectors[name].shape) != shape]
        if wrong:
            raise AdapterFileError(f"the vectors of {shortened(wrong)} have other shapes in {path}")
        other = [
            name
            for name, known in self.fingerprints.items()
            if name in file.fingerprints and not known.agrees(file.fingerprints[name])
        ]
        if other:
            raise BaseMismatchError(f"the adapter was trained on another base than {path}: {shortened(other)} differ")
        if file.saved:
            raise AdapterFileError(
                f"the adapter also trained {shortened(file.saved)} (modules_to_save, train_norms), which {path} holds "
                "as constants: load the adapter into the model and export that"
            )


def digest(vectors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of float32 vectors and their names, in the order of names."""
    sha = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        sha.update(name.encode() + np.ascontiguousarray(vector, dtype="<f4").tobytes())
    return sha.hexdigest()
