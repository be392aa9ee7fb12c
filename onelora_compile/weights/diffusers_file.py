"""A LoRA as diffusers writes it: one file, `pytorch_lora_weights.safetensors`.

    <part>.<path>.lora_A.weight, .lora_B.weight     of a part of the pipeline; no part from a model's save_lora_adapter
    <part>.<path>.lora.down.weight, .lora.up.weight the same, of a Stable Diffusion; of its text encoder with
                                                    .lora_linear_layer for .lora
    metadata    lora_adapter_metadata (JSON): the configuration of PEFT, `<part>.<field>`; not in every file

Without a configuration alpha is the rank, as diffusers takes it.

Source: diffusers 0.42, `loaders/lora_base.py`, `loaders/peft.py`, `utils/peft_utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from onelora_compile.errors import AdapterFileError
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import AdapterFile
from onelora_compile.weights.peft_config import CONFIG, LORA, checked_config, these_alone
from onelora_compile.weights.peft_folder import adapter_of
from onelora_compile.weights.peft_tensors import PREFIX

_METADATA = "lora_adapter_metadata"
_FACTOR = re.compile(r"(?P<path>.+)\.(?:(?P<factor>lora_[AB])|lora(?:_linear_layer)?\.(?P<way>down|up))\.weight")
_NEWER = {"down": "lora_A", "up": "lora_B"}
# What other programs call factors, whose names of modules are no paths in the model.
_OTHERS = {
    "kohya's scripts": re.compile(r".+\.lora_(down|up)\.weight"),
    "an old diffusers": re.compile(r".+\.processor\.to_\w+_lora\.(down|up)\.weight"),
}
# The models of a pipeline, as its save_lora_weights calls them.
_PART = re.compile(r"(unet|transformer|text_encoder|prior|controlnet|connectors|text_conditioner)(_\d+|_ref)?")


def is_lora(names: Collection[str]) -> bool:
    """Whether a file of safetensors has the factors of a LoRA."""
    return any(form.fullmatch(name) for name in names for form in (_FACTOR, *_OTHERS.values()))


def read_lora(stored: Mapping[str, Tensor], metadata: dict[str, str], path: Path, approximate: bool) -> AdapterFile:
    """Read the LoRA of one model.

    Args:
        stored: the tensors, by the names in the file.
        metadata: of the file.
        path: the file, for messages.
        approximate: take the best vector for each layer of a LoRA that is more than that.

    Raises:
        AdapterFileError: the tensors of a folder of PEFT, of another program, of several models, damaged, or more than
            vectors hold.
    """
    if any(name.startswith(PREFIX) for name in stored):
        raise AdapterFileError(
            f"{path} holds the tensors of an adapter of PEFT, whose scale is in the {CONFIG} that belongs to them: "
            "give the folder that has both"
        )
    for origin, form in _OTHERS.items():
        if found := [name for name in stored if form.fullmatch(name)]:
            raise AdapterFileError(
                f"{path} is a LoRA of {origin} ({shortened(found, 1)}), whose names are not those of the model: "
                "diffusers reads it, pipe.load_lora_weights(path, adapter_name='default'), and saves each model by "
                "itself, as pipe.unet.save_lora_adapter(folder) does"
            )
    fields = _said(metadata, path)
    parts = {"" if "r" in fields else _part(name) for name in stored}
    if len(parts) > 1:
        listed = shortened(sorted(one or "a model without a name" for one in parts))
        raise AdapterFileError(
            f"{path} is a LoRA of diffusers for {listed}, and an adapter is of one model: write the tensors of one of "
            "them, with their names, into a file of their own"
        )
    prefix = f"{part}." if (part := parts.pop()) else ""
    tensors = {_newer(name.removeprefix(prefix)): value for name, value in stored.items()}
    said = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    config = checked_config({"peft_type": LORA} | (said or _as_stored(tensors)), path)
    return adapter_of(config, tensors, {}, path, approximate)


def _said(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The configurations in the metadata; empty without."""
    try:
        fields: Any = json.loads(metadata.get(_METADATA) or "{}")
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: damaged metadata: {_METADATA}: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path}: damaged metadata: {_METADATA} is {shortened([str(fields)])}")
    return fields


def _part(name: str) -> str:
    """The part of a pipeline that a tensor is of; "" where its name tells none."""
    first = name.partition(".")[0]
    return first if _PART.fullmatch(first) else ""


def _newer(name: str) -> str:
    found = _FACTOR.fullmatch(name)
    return f"{found['path']}.{found['factor'] or _NEWER[found['way']]}.weight" if found else name


def _as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of a file that has none: the ranks of its tensors, and a scale of 1."""
    by_rank: dict[int, list[str]] = {}
    for name, value in tensors.items():
        if (found := _FACTOR.fullmatch(name)) and found["factor"] == "lora_A" and value.ndim:
            by_rank.setdefault(len(value), []).append(found["path"])
    usual = max(by_rank, key=lambda rank: len(by_rank[rank]), default=1)
    others = {f"^({these_alone(names)})": rank for rank, names in by_rank.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
