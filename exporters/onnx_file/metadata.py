"""What a model file says about its vectors: entries `onelora.…` of ONNX `metadata_props`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from onelora_compile.errors import AdapterFileError, BaseMismatchError, ExportError
from onelora_compile.exporters.jetson.device.core.modes import MODES, HasMode
from onelora_compile.printable import shortened
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import digest, float32
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.adapter_metadata import DAMAGED
from onelora_compile.weights.fingerprint import Fingerprint

_KEY = "onelora."
PRODUCER_KEY = f"{_KEY}producer"  # stands in every file that this package wrote


@dataclasses.dataclass(frozen=True)
class TableSource:
    """Which part of a tensor of an adapter is its row in a table of a bank.

    Attributes:
        name: of the tensor.
        offset: the number in it, flat, that the row begins with.
        strides: how many numbers of it further the next one is, along each axis of the row.
    """

    name: str
    offset: int
    strides: tuple[int, ...]

    def row(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The row, of its shape, that an adapter with this tensor has."""
        places = np.full((), self.offset)
        for stride, size in zip(self.strides, shape, strict=True):
            places = places[..., None] + stride * np.arange(size)
        row: np.ndarray = tensor.reshape(-1).take(places, mode="clip")
        return row


@dataclasses.dataclass(frozen=True)
class Metadata(HasMode):
    """The vectors of an ONNX model.

    Attributes:
        mode: "fold", "load", "input", "bank", or "base" for a model without vectors.
        vectors: shape of each tensor that an adapter gives and the graph uses, by name: vectors, and what was trained
            as it is (heads, norms).
        fingerprints: of the base weights of the vectors, by the same names.
        trained: those of `vectors` that take the place of a base value instead of being added to a weight, with the
            fingerprint of that value.
        constant: other tensors of the adapter that the graph does not take from it, with their digest: "" where the
            graph does not use them.
        adapters: names of the adapters: those of a bank by id, of mode "fold" those that were folded, in order.
        digests: of the adapters of a bank, by id: what tells whether a file is one of them.
        tables: of a bank, where each table's rows come from; empty where an older version wrote the file, or a row
            is not a regular part of one tensor.
        sha256: of the vectors that the file was written with, "" for a base.
        producer: what wrote it.
        uses: as in `AdapterFile`.
    """

    mode: str = "base"
    vectors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    fingerprints: Mapping[str, Fingerprint] = dataclasses.field(default_factory=dict)
    trained: Mapping[str, Fingerprint] = dataclasses.field(default_factory=dict)
    constant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    tables: Mapping[str, TableSource] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    producer: str = f"onelora-compile {__version__}"
    uses: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def to_props(self) -> dict[str, str]:
        """As entries of `metadata_props`."""
        return {
            f"{_KEY}mode": self.mode,
            f"{_KEY}vectors": json.dumps({name: list(shape) for name, shape in self.vectors.items()}),
            f"{_KEY}fingerprints": json.dumps({name: one.to_json() for name, one in self.fingerprints.items()}),
            f"{_KEY}trained": json.dumps({name: one.to_json() for name, one in self.trained.items()}),
            f"{_KEY}constant": json.dumps(dict(self.constant)),
            f"{_KEY}adapters": json.dumps(list(self.adapters)),
            f"{_KEY}digests": json.dumps(list(self.digests)),
            f"{_KEY}tables": json.dumps({name: dataclasses.astuple(one) for name, one in self.tables.items()}),
            f"{_KEY}adapter_sha256": self.sha256,
            PRODUCER_KEY: self.producer,
            f"{_KEY}uses": json.dumps(dict(self.uses)),
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str], path: str) -> Metadata:
        """Read `to_props` output; a model without these entries is a base.

        Raises:
            AdapterFileError: the entries are damaged, or of a mode that a newer version wrote.
        """
        own = {key.removeprefix(_KEY): value for key, value in props.items() if key.startswith(_KEY)}
        if not own:
            return cls(producer="")
        if own.get("mode", "base") not in MODES:
            raise AdapterFileError(
                f"{path} is of mode {own['mode']!r}, which this version does not know: upgrade onelora-compile"
            )
        try:
            return cls(
                mode=own["mode"],
                vectors={str(name): tuple(map(int, shape)) for name, shape in json.loads(own["vectors"]).items()},
                fingerprints=_prints(own.get("fingerprints", "{}")),
                trained=_prints(own.get("trained", "{}")),
                constant={str(name): str(one) for name, one in json.loads(own.get("constant", "{}")).items()},
                adapters=tuple(map(str, json.loads(own.get("adapters", "[]")))),
                digests=tuple(map(str, json.loads(own.get("digests", "[]")))),
                tables=_sources(own.get("tables", "{}")),
                sha256=own.get("adapter_sha256", ""),
                producer=own.get("producer", ""),
                uses={str(name): (int(a), int(b)) for name, (a, b) in json.loads(own.get("uses", "{}")).items()},
            )
        except DAMAGED as error:
            raise AdapterFileError(f"{path}: damaged onelora metadata: {error!r}") from error

    def check_fits(self, file: AdapterFile, path: str, whole: bool = True) -> None:
        """Whether an adapter belongs to this model.

        What a trained head replaces is not compared: a new head is random, and another one in every process.

        Args:
            file: the adapter.
            path: of the model.
            whole: whether it has to give all that the model takes; for a bank the base gives the rest.

        Raises:
            AdapterFileError: it has other vectors or trained tensors, or other shapes.
            BaseMismatchError: it was trained on another base.
        """
        file.require_fingerprints("the adapter")
        tensors = file.tensors
        if missing := sorted(set(file.vectors) - set(self.vectors) - set(self.constant)):
            raise AdapterFileError(
                f"{path} has no place for vectors of the adapter: {shortened(missing)}; it has "
                f"{shortened(self.vectors)}"
            )
        if whole and (absent := sorted(set(self.vectors) - set(tensors))):
            kind = "trained values" if set(absent) <= set(self.trained) else "vectors"
            raise AdapterFileError(f"the adapter has no {kind} for {shortened(absent)} of {path}")
        given = [name for name in self.vectors if name in tensors]
        if mixed := sorted(name for name in given if (name in self.trained) != (name in file.saved)):
            raise AdapterFileError(
                f"{shortened(mixed)}: a vector in {path} or in the adapter, trained whole in the other"
            )
        wrong = [name for name in given if tuple(tensors[name].shape) != self.vectors[name]]
        if wrong:
            raise AdapterFileError(f"the vectors of {shortened(wrong)} have other shapes in {path}")
        other = [
            name
            for name, known in self.fingerprints.items()
            if name in file.fingerprints and not known.agrees(file.fingerprints[name])
        ]
        if other:
            raise BaseMismatchError(f"the adapter was trained on another base than {path}: {shortened(other)} differ")
        if held := [name for name in file.saved if name not in self.vectors and self._differs(name, file)]:
            raise AdapterFileError(
                f"the adapter also trained {shortened(held)} (modules_to_save, train_norms), which {path} holds as "
                "constants: export the model with an adapter that trained them too"
            )

    def _differs(self, name: str, file: AdapterFile) -> bool:
        known = self.constant.get(name)
        return known is None or known not in ("", digest({name: file.saved[name].numpy()}))

    def values_of(self, file: AdapterFile) -> dict[str, np.ndarray]:
        """What an adapter gives this model, float32 by name; for an adapter that fits."""
        tensors = file.tensors
        return {name: float32(tensors[name]) for name in self.vectors if name in tensors}


def bank_id(metadata: Metadata, path: str | os.PathLike[str], adapter: str | os.PathLike[str] | AdapterFile) -> int:
    """The number of a bank's adapter: from its name, or from a file by what that holds, whatever it is called.

    Raises:
        ExportError: the bank has no adapter of that name.
        AdapterFileError: none has the values of the file; or the file is damaged.
        FileNotFoundError: a path, and no file there.
    """
    known = f"it has {shortened(metadata.adapters)}"
    if not isinstance(adapter, AdapterFile):
        text = os.fspath(adapter)
        if not text.endswith(".safetensors") and text in metadata.adapters:
            return metadata.adapters.index(text)
        if os.path.basename(text) == text and not text.endswith(".safetensors") and not os.path.isfile(text):
            raise ExportError(f"{path} has no adapter {text!r}; {known}")
        adapter = read_adapter(text)
    if not metadata.digests:
        raise AdapterFileError(
            f"{path} does not say what its adapters are made of, as an older version wrote it: give the adapter's name "
            f"or id instead of a file, or export the bank again; {known}"
        )
    taken = {name: value for name, value in adapter.tensors.items() if name not in metadata.constant}
    own = digest({name: float32(value) for name, value in taken.items()})
    if own not in metadata.digests:
        raise AdapterFileError(f"no adapter of {path} has the values of this file, whatever its name; {known}")
    return metadata.digests.index(own)


def checked_ids(ids: Sequence[int] | np.ndarray, count: int, rows: int | None = None) -> np.ndarray:
    """The ids of a bank's call, int64, with -1 for the base.

    Args:
        ids: as a user gives them.
        count: of the bank's adapters.
        rows: of the batch, of which each has an id; None is not known.

    Raises:
        ExportError: no whole numbers, none of the bank's, or another number of them.
    """
    found = np.asarray(ids)
    if found.size and found.dtype.kind not in "iu":  # 0.9 would be adapter 0
        raise ExportError(f"adapter_ids {found.tolist()} are not whole numbers, but {found.dtype}")
    # The table's last row is the base, so ids beyond it would be read without an error.
    if found.size and (found.min() < -1 or found.max() >= count):
        raise ExportError(f"adapter_ids {found.tolist()} are not all between -1 (the base) and {count - 1}")
    if rows is not None and found.shape != (rows,):  # a runtime may repeat one row for all ids
        raise ExportError(f"adapter_ids {found.tolist()} are not one for each of the {rows} rows of the batch")
    return found.astype(np.int64)


def _prints(text: str) -> dict[str, Fingerprint]:
    return {str(name): Fingerprint.from_json(fields) for name, fields in json.loads(text).items()}


def _sources(text: str) -> dict[str, TableSource]:
    known = json.loads(text).items()
    return {str(table): TableSource(str(name), int(at), tuple(map(int, by))) for table, (name, at, by) in known}
