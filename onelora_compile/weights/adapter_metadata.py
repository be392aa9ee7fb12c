"""What the metadata of a safetensors file says of the base of an adapter: in adapter files, and in folders of PEFT.

Keys, with JSON values
    fingerprints        JSON, by the name of each vector; null where the base is not known
    saved_fingerprints  of the base values of what is stored as trained
    saved_aliases       of trained parameters that are tied, their other names
    uses                how often one forward uses a weight, [at least, at most], where that may be more than once;
                        0 at most is no count, a negative number no bound
    layers              what each vector is on, [kind, inputs], but for a linear of the inputs that its fingerprint has
    base_model          [name or path, PEFT's task type]
    carried             names of what lies in a folder of PEFT, which holds whole modules, and was not trained
    parts               of a sum of adapters, [weight, file name, digest of the vectors, whether its base was compared]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onelora_compile.errors import AdapterFileError
from onelora_compile.printable import shortened
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import LAYER_KINDS, LINEAR, AdapterFile, Layer, Part
from onelora_compile.weights.fingerprint import Fingerprint

PRODUCER = f"onelora-compile {__version__}"
# What reading damaged metadata raises; a number of 400 digits is too large for a float.
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)


@dataclasses.dataclass(frozen=True)
class Base:
    """What a file says of its base: as the fields of `AdapterFile`; `names` are those of all vectors."""

    names: list[str]
    fingerprints: dict[str, Fingerprint]
    bases: dict[str, Fingerprint]
    aliases: dict[str, tuple[str, ...]]
    uses: dict[str, tuple[int, int]]
    layers: dict[str, Layer]
    base_model: str
    task_type: str
    producer: str
    parts: tuple[Part, ...] = ()
    carried: tuple[str, ...] = ()


def base_to_metadata(file: AdapterFile) -> dict[str, str]:
    """The metadata of a file."""
    prints = {name: file.fingerprints.get(name) for name in file.vectors}
    metadata = {
        "producer": PRODUCER,
        "fingerprints": json.dumps({name: one.to_json() if one else None for name, one in prints.items()}),
        "saved_fingerprints": json.dumps({name: one.to_json() for name, one in file.bases.items()}),
        "saved_aliases": json.dumps(file.aliases),
        "uses": json.dumps(file.uses),
    }
    if file.layers:
        special = {name: [one.kind, one.inputs] for name, one in file.layers.items() if one != _plain(prints[name])}
        metadata["layers"] = json.dumps(special)
    if file.base_model or file.task_type:
        metadata["base_model"] = json.dumps([file.base_model, file.task_type])
    if file.parts:
        metadata["parts"] = json.dumps([dataclasses.astuple(part) for part in file.parts])
    return metadata


def _plain(known: Fingerprint | None) -> Layer:
    return Layer(LINEAR, (known.shape[1],) if known else None)


def parsed_base(metadata: Mapping[str, str]) -> Base:
    """What the metadata of a file says, unchecked against its tensors.

    Raises:
        one of DAMAGED: it is.
    """
    raw = json.loads(metadata["fingerprints"])
    prints = {name: Fingerprint.from_json(fields) for name, fields in raw.items() if fields is not None}
    bases = json.loads(metadata.get("saved_fingerprints", "{}")).items()
    aliases = json.loads(metadata.get("saved_aliases", "{}")).items()
    # A file without counts, as the first versions wrote them, says nothing of any.
    uses = (json.loads(metadata["uses"]) if "uses" in metadata else dict.fromkeys(raw, (1, -1))).items()
    name, task = json.loads(metadata.get("base_model", '["", ""]'))
    return Base(
        names=list(raw),
        fingerprints=prints,
        bases={name: Fingerprint.from_json(fields) for name, fields in bases},
        aliases={name: tuple(map(str, others)) for name, others in aliases},
        uses={name: (int(a), int(b)) for name, (a, b) in uses},
        layers=_layers(metadata, list(raw), prints),
        base_model=str(name),
        task_type=str(task),
        producer=metadata.get("producer", "unknown"),
        parts=tuple(_part(*fields) for fields in json.loads(metadata.get("parts", "[]"))),
        carried=tuple(map(str, json.loads(metadata.get("carried", "[]")))),
    )


def _part(weight: Any, name: Any, digest: Any, compared: Any) -> Part:
    found = Part(float(weight), str(name), str(digest), bool(compared))
    if not math.isfinite(found.weight) or not re.fullmatch("[0-9a-f]{64}", found.digest):
        raise ValueError(f"not a part of a sum: {found}")
    return found


def _layers(metadata: Mapping[str, str], names: list[str], prints: Mapping[str, Fingerprint]) -> dict[str, Layer]:
    if "layers" not in metadata:
        return {}
    special: dict[str, Any] = json.loads(metadata["layers"])
    if strange := set(special) - set(names):
        raise ValueError(f"layers of no vector: {shortened(sorted(strange))}")
    if any(kind not in LAYER_KINDS or any(size < 1 for size in axes or ()) for kind, axes in special.values()):
        raise ValueError("layers of no known kind or size")
    found = {
        name: Layer(str(kind), None if sizes is None else tuple(map(int, sizes)))
        for name, (kind, sizes) in special.items()
    }
    return {name: found.get(name) or _plain(prints.get(name)) for name in names}


def base_from_metadata(
    metadata: Mapping[str, str], vectors: Collection[str], saved: Collection[str], path: Path
) -> Base:
    """What a folder of PEFT says of its base; nothing where PEFT wrote it.

    Raises:
        AdapterFileError: the metadata is damaged, or of other tensors.
    """
    if "fingerprints" not in metadata:
        return Base([], {}, {}, {}, {}, {}, "", "", "")
    try:
        found = parsed_base(metadata)
    except DAMAGED as error:
        raise AdapterFileError(f"{path}: damaged metadata: {error}") from error
    if set(found.names) != set(vectors) or set(found.bases) - set(saved):
        raise AdapterFileError(f"{path}: damaged: its metadata is of other tensors than it holds")
    return found
