"""The base of an adapter for llama.cpp, from what the user has of it: its configuration, or its own GGUF file.

llama.cpp compares names and shapes alone. A GGUF file has the weights themselves, so here they are compared with the
adapter's fingerprints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onelora_compile.errors import BaseMismatchError, ConfigError
from onelora_compile.file_names import check_there
from onelora_compile.printable import percent, shortened
from onelora_compile.progress import steps
from onelora_compile.weights.adapter_content import AdapterFile
from onelora_compile.weights.file_kinds import GGUF_FILE
from onelora_compile.weights.fingerprint import Fingerprint, fingerprint
from onelora_compile.weights.gguf_layout import (
    ARCHITECTURES,
    GgufLayout,
    interleaved_heads,
    layout_of_config,
    open_file,
    the_package,
)

CONFIG = "config.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of others the fingerprint is of what they hold


def layout_for(file: AdapterFile, base: Path | None) -> GgufLayout:
    """The layout of the base of an adapter; a base that is a GGUF file is compared with the adapter.

    Args:
        file: the adapter.
        base: the base's folder, its `config.json`, or its `.gguf`; None takes the folder that the adapter names.

    Raises:
        ConfigError: there is no base, it is none of these, or its architecture is not known here.
        BaseMismatchError: the adapter was trained on other weights than the GGUF file's.
        FileNotFoundError: there is no such file.
    """
    # Without a name the path would be the working folder.
    if base is None and not (file.base_model and Path(file.base_model, CONFIG).is_file()):
        named = f"; the adapter names {file.base_model!r}, which is no folder here" if file.base_model else ""
        raise ConfigError(f"a GGUF file needs the base: its folder, config.json or .gguf (base=, --base){named}")
    path = Path(file.base_model) if base is None else base
    if path.suffix != GGUF_FILE:
        return layout_of_base(path)
    layout, tensors = _of_gguf(path)
    _check(file, tensors, layout)
    return layout


def layout_of_base(path: Path) -> GgufLayout:
    """The layout of a base: of its folder, its `config.json`, or its `.gguf`.

    Raises:
        ConfigError: it is none of these, or its architecture is not known here.
        FileNotFoundError: there is no such file.
    """
    if path.suffix == GGUF_FILE:
        return _of_gguf(path)[0]
    return _of_config(path / CONFIG if path.is_dir() else path)


def _of_gguf(path: Path) -> tuple[GgufLayout, Mapping[str, Any]]:
    """The layout that the header of a GGUF file tells, and its tensors by name."""
    check_there(path)
    tensors, fields = open_file(path, ConfigError)
    return _layout(fields, "output.weight" in tensors, path), tensors


def _of_config(path: Path) -> GgufLayout:
    check_there(path)
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        return layout_of_config(dict(fields), str(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ConfigError(f"{path} is no config.json: give the base's folder, its config.json or .gguf") from error


def _layout(fields: Mapping[str, Any], own_head: bool, path: Path) -> GgufLayout:
    """What the header of a GGUF file says."""
    kind = str(fields.get("general.architecture"))
    blocks, heads = _size(fields, f"{kind}.block_count"), _size(fields, f"{kind}.attention.head_count")
    grouped = _size(fields, f"{kind}.attention.head_count_kv", heads)
    if kind not in ARCHITECTURES.values() or min(blocks, heads, grouped) < 1:
        raise ConfigError(
            f"{path}: a {fields.get('general.type', 'model')} of architecture {kind!r}, {blocks} layers and {heads} "
            f"heads; known here are models of {', '.join(dict.fromkeys(ARCHITECTURES.values()))}"
        )
    return GgufLayout(kind, blocks, interleaved_heads(kind, heads, grouped), own_head, str(path))


def _size(fields: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A field that is one number; 0 where it is anything else, as a list by layers."""
    found = fields.get(key, default)
    return found if isinstance(found, int) else 0


def _check(file: AdapterFile, tensors: Mapping[str, Any], layout: GgufLayout) -> None:
    names = {name: layout.name(name) for name in file.vectors}
    if missing := [name for name in names.values() if name not in tensors]:
        raise BaseMismatchError(f"{layout.source} has no {shortened(missing)}; of a split file give the config.json")
    wrong = []
    with steps("check of the base", len(names)) as announce:
        for name, key in names.items():
            announce(name)
            out_features, in_features = (int(size) for size in tensors[key].shape[::-1])
            known = file.fingerprints.get(name)
            shape = known.shape if known else (file.vectors[name].numel(), in_features)
            if shape != (out_features, in_features):
                wrong.append(f"{name} is {[out_features, in_features]} and not {list(shape)}")
            elif known and not (here := _fingerprint(name, tensors[key], layout)).agrees(known):
                wrong.append(f"{name} (differs by {percent(here.distance(known))})")
    if wrong:
        raise BaseMismatchError(
            f"the adapter was trained on another base than {layout.source}: {len(wrong)} of {len(names)} weights are "
            f"not those it was trained with: {shortened(wrong, 5)}"
        )


def _fingerprint(name: str, tensor: Any, layout: GgufLayout) -> Fingerprint:
    """Of a weight in transformers' order of rows."""
    values = np.array(
        the_package().dequantize(tensor.data, tensor.tensor_type), np.float32
    )  # of float32 it is the file
    found = fingerprint(layout.rows_back(name, torch.from_numpy(values)))
    kind = tensor.tensor_type.name
    return dataclasses.replace(found, dtype=_DTYPES.get(kind, kind.lower()))
