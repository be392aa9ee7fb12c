"""What TensorRT-RTX's compiler made of a network, read from the text inside its plans.

The format is undocumented and is another one in full TensorRT: good for tests and benchmarks, nothing depends on it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

# Statements of a plan's program that launch a kernel: compiled ones, matmuls of the library, with and without an
# epilogue, and convolutions.  The others move and check sizes on the host.
_LAUNCHES = rb"\n  (function|fully_connected|runtime_fusion|corrltn)=\{ name=\"?([^\s\"]+)"


def kernels(plan: Any) -> list[str]:
    """The kernels that a plan launches, in order: names of compiled ones ("SumMul"), of matmuls those of their nodes.

    Empty for a plan without such text.
    """
    raw = bytes(plan)
    start = raw.find(b"\nmain {")  # programs after it are other forms of single kernels
    if start < 0:
        return []
    program = raw[start : raw.find(b"\0", start)]
    return [name.decode().removeprefix("__myl_") for _, name in re.findall(_LAUNCHES, program)]


def holds(plan: Any, array: np.ndarray) -> bool:
    """Whether a constant's bytes stand in a plan: as they are, transposed, or row by row in a matrix packed of several.

    Only for rows of some ten bytes or more: shorter ones may be there by accident.
    """
    raw = bytes(plan)
    forms = [array, array.T] if array.ndim == 2 else [array]
    if any(np.ascontiguousarray(one).tobytes() in raw for one in forms):
        return True
    return array.ndim == 2 and any(all(np.ascontiguousarray(row).tobytes() in raw for row in one) for one in forms)
