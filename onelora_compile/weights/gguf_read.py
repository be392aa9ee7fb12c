"""Adapters of llama.cpp as vectors: what `gguf_file.py` writes, and LoRA of others where that is one for each linear.

ΔW = alpha / r · B A, with its rows in llama.cpp's order; an alpha of 0 is no factor
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.errors import AdapterFileError
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import AdapterFile, check_finite
from onelora_compile.weights.gguf_layout import GgufLayout, layout_of_adapter, open_file, the_package
from onelora_compile.weights.peft_config import LORA, PeftConfig
from onelora_compile.weights.peft_tensors import PREFIX, from_peft

_FACTORS = {".lora_a": "lora_A", ".lora_b": "lora_B"}  # llama.cpp's endings, PEFT's words
_ALPHA = "adapter.lora.alpha"


def read_gguf(
    path: Path, layout: GgufLayout | None = None, approximate: bool = False, *, ordered: bool = True
) -> AdapterFile:
    """Read and check an adapter of llama.cpp.

    Args:
        path: the file.
        layout: of its base; None is enough where the architecture alone tells it.
        approximate: take the best vector of each linear of a LoRA that is more than that.
        ordered: False leaves the rows as the file has them where the order needs a base, which is enough to look.

    Returns:
        Vectors in transformers' names and order of rows, without fingerprints.

    Raises:
        AdapterFileError: no adapter, damaged, of another architecture than the base, or more than vectors hold.
        ConfigError: the order of its rows needs the base.
        FileNotFoundError: there is no such file.
        MissingExtraError: the package gguf is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    tensors, fields = open_file(path, AdapterFileError)
    _check_kind(fields, path)
    if layout is None:
        layout = layout_of_adapter(fields, tensors, path, ordered)
    if (found := fields.get("general.architecture")) != layout.architecture:
        raise AdapterFileError(f"{path} is for a {found}; {layout.source} is a {layout.architecture}")
    stored = _stored(tensors, layout, path)
    read = from_peft(_config(stored, fields.get(_ALPHA, 0.0), path), stored, path, approximate)
    check_finite(read.vectors, f"{path}: a vector is too large for float32")
    return AdapterFile(
        config=OneLoRAConfig(target_modules=list(read.vectors)),
        vectors=read.vectors,
        saved={},
        fingerprints={},
        producer="GGUF",
        layers={name: layout.layer(name, one) for name, one in read.layers.items()},
        projection=read.projection,
    )


def _check_kind(fields: Mapping[str, Any], path: Path) -> None:
    kind, adapter = fields.get("general.type", "model"), fields.get("adapter.type")
    if kind != "adapter" or adapter != "lora":
        what = f"an adapter of type {adapter!r}" if kind == "adapter" else f"a {kind}"
        raise AdapterFileError(f"{path} is {what}, and no LoRA, the kind that vectors can hold")
    if fields.get("adapter.alora.invocation_tokens"):
        raise AdapterFileError(
            f"{path} is an activated LoRA, which is on from some token onwards: no vector holds that"
        )


def _stored(tensors: Mapping[str, Any], layout: GgufLayout, path: Path) -> dict[str, Tensor]:
    """The factors under PEFT's keys, float32, with the rows of lora_B in transformers' order."""
    modules, stored, strange = layout.modules(), {}, []
    for name, tensor in tensors.items():
        stem, ending = name[:-7], name[-7:]
        if ending not in _FACTORS or stem not in modules:
            strange.append(name)
            continue
        values = torch.from_numpy(np.array(the_package().dequantize(tensor.data, tensor.tensor_type), np.float32))
        if values.ndim != 2:
            raise AdapterFileError(f"{path}: {name} is {list(values.shape)}, and a factor has two axes")
        rows = layout.rows_back(modules[stem], values) if ending == ".lora_b" else values
        stored[f"{PREFIX}{modules[stem]}.{_FACTORS[ending]}.weight"] = rows
    if strange:
        raise AdapterFileError(
            f"{path} holds {shortened(strange)}, which is no LoRA of a linear of a {layout.architecture} of "
            f"{layout.blocks} layers ({layout.source}): it would be lost"
        )
    check_finite(stored, f"{path} was not loaded")
    return stored


def _config(stored: Mapping[str, Tensor], alpha: Any, path: Path) -> PeftConfig:
    """What PEFT would say of it: there is one alpha, and each linear may have a rank of its own."""
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise AdapterFileError(f"{path}: damaged: {_ALPHA} is {alpha!r}")
    ranks = {key.removeprefix(PREFIX).partition(".lora_A")[0]: len(a) for key, a in stored.items() if ".lora_A" in key}
    first = next(iter(ranks.values()), 1)
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != first}
    alphas = {} if alpha else dict(others)
    fields = {"r": first, "lora_alpha": alpha or first, "rank_pattern": others, "alpha_pattern": alphas}
    return PeftConfig(LORA, fields)
