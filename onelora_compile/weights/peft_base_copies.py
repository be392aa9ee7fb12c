"""Copies of the base's weights in a folder of PEFT: of a language model's head that is adapted, as PEFT saves it.

    <path>.base_layer.weight, <path>.base_layer.bias    beside the vector of <path>; they change nothing on their base

The weight tells which base that is. Biases are no part of what is known of a base.

Source: PEFT 0.21, `peft/utils/save_and_load.py`, `save_embedding_layers`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from onelora_compile.weights.fingerprint import Fingerprint, fingerprint

_COPY = re.compile(r"(?P<path>.+)\.base_layer\.(?P<what>weight|bias)")


def without_base_copies(
    tensors: Mapping[str, Tensor], adapted: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Fingerprint]]:
    """Take the copies out.

    Args:
        tensors: what is stored besides vectors, by name.
        adapted: the modules with a vector.

    Returns:
        All others, a quantised weight among them, and what the copies tell of the base's weights, by module.
    """
    others: dict[str, Tensor] = {}
    known: dict[str, Fingerprint] = {}
    for name, value in tensors.items():
        found = _COPY.fullmatch(name)
        axes = {"weight": 2, "bias": 1}[found["what"]] if found else 0
        if found is None or found["path"] not in adapted or value.ndim != axes or not value.is_floating_point():
            others[name] = value
        elif found["what"] == "weight":
            known[found["path"]] = fingerprint(value)
    return others, known
