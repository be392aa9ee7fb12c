"""In which order a matrix of an ONNX file lies, by what reads it: where the numbers of a square one do not tell.

A weight of zeros, the identity, a rotation: such a matrix is its own transpose, and W + b 1ᵀ is not.

    MatMul(x, W)    Gemm(x, W)               Einsum("bi,io->bo", x, W)    [in_features, out_features]
    MatMul(W, x)    Gemm(x, W, transB=1)     Conv(x, W)                   [out_features, in_features]

A Transpose on the way turns it once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.exporters.fold.find_weights import Weight, WeightUse
from onelora_compile.exporters.quantized.products import factors_of, output_axis

if TYPE_CHECKING:
    import onnx_ir


def lies_turned(uses: Iterable[WeightUse]) -> bool | None:
    """Whether a constant lies as [in_features, out_features] for all of these uses; None where they do not tell."""
    found = {_turned(use) for use in uses}
    return found.pop() if len(found) == 1 else None


def is_own_transpose(weight: Weight) -> bool:
    """Whether a square weight may be its own transpose, by the corner of it that is read first."""
    _, part = next(iter(weight.by_rows()))
    corner = part[:, : len(part)].astype(np.float64)
    return bool(np.linalg.norm(corner - corner.T) <= 0.5 * np.linalg.norm(corner))


def _turned(use: WeightUse) -> bool | None:
    if use.product is not None:  # its matrix is [out_features, in_features] whatever the op
        return False
    if use.position not in factors_of(use.op):
        return None
    axis = output_axis(use.op, use.position)
    turns = [_turns(node) for node in use.nodes[:-1]]
    if axis is None or None in turns:
        return None
    return (axis + sum(map(bool, turns))) % 2 == 1


def _turns(node: onnx_ir.Node) -> bool | None:
    """Whether an op on the way exchanges the two axes of a matrix; None where that is not told."""
    if node.op_type != "Transpose":
        return False
    source = node.inputs[0]
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None
    if order is None:
        return True
    if len(order) > 2 and (source is None or source.shape is None):
        return None
    sizes = [2, 2] if len(order) == 2 else list(source.shape)  # type: ignore[union-attr, arg-type]
    kept = [axis for axis in order if sizes[axis] != 1]
    return kept != sorted(kept)
