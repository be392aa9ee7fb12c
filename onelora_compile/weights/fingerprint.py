"""A fingerprint of a weight that survives a change of dtype and device, and tells how far another weight is.

    sketch = Lᵀ W R,  L [out_features, 4] and R [in_features, 4] of fixed random signs

The 16 numbers are a random projection of W: the expected square of a difference of two sketches is 16 times the
squared Frobenius distance of the weights (Johnson-Lindenstrauss).  So they agree to the rounding of the storage
dtype, and a hash, which would not, is no substitute.  Only numpy is needed to make one of an array.

Rounding to few bits moves a weight as far as factors of its columns do.  The levels tell these apart:

    L_j = log(‖W_j‖² / mean_j ‖W_j‖² + 0.1) / 2,  levels = Sᵀ (L - mean L) / √n,  S [n, 16] of fixed random signs

The root mean square of a difference of two is that of the logarithms of the factors.  Rounding errors of a column
have nothing to do with each other, so that its norm hardly moves.

NaN and infinity count as zeros: a layer that no forward uses may hold anything.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from onelora_compile.adapting.module_effect import base_effect
from onelora_compile.adapting.weight_target import Target
from onelora_compile.errors import StateError
from onelora_compile.kinds import is_plain
from onelora_compile.looking.process_flags import no_autocast
from onelora_compile.sharded import whole

_WIDTH = 4  # columns of L and of R
_CHUNK = 1 << 22  # entries of W that are converted at a time
_LEVELS = 16  # numbers that tell the levels of the columns, and as many those of the rows
_FAINT = 0.1  # columns with less than this share of the mean square count little: rounding makes them anything
_LEAST = 32  # rows and columns: with fewer, rounding moves norms as factors do

# Relative Frobenius distance that storing a weight in a dtype can cause, with a margin of about 5: measured
# 2e-4 for float16 and 1.7e-3 for bfloat16 on transformers' weights; float64 and float32 differ by rounding alone.
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
# Of a module that computes something else than W x + c: nothing can be folded where this is the dtype.
OUTPUT = "output"
TOLERANCE[OUTPUT] = 1e-2
# Quantised storage: int4 in groups of 32 is 0.07 away from its original, int8 0.004; an unrelated weight is 1.0 to 1.4.
_TOLERANCE_OTHER = 0.25


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What is known of a weight [out_features, in_features] without having it.

    Attributes:
        shape: (out_features, in_features).
        dtype: in which it was stored when the fingerprint was taken.
        norm: Frobenius norm.
        sketch: float32 [16].
        columns, rows: the levels of its columns and rows, float32 [16], rounded to float16; None where there are few,
            where the weight can't be read, where nobody asked for them, and in files of older versions.
    """

    shape: tuple[int, int]
    dtype: str
    norm: float
    sketch: np.ndarray
    columns: np.ndarray | None = None
    rows: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; arrays are base64, the sketch of little-endian float32, levels of float16."""
        coded = {"sketch": _coded(self.sketch, "<f4")}
        if self.columns is not None and self.rows is not None:
            coded |= {"columns": _coded(self.columns, "<f2"), "rows": _coded(self.rows, "<f2")}
        return {"shape": list(self.shape), "dtype": self.dtype, "norm": self.norm, **coded}

    @classmethod
    def from_json(cls, fields: Any) -> Fingerprint:
        """Read `to_json` output.

        Raises:
            ValueError: not such values.
        """
        try:
            out_features, in_features = (int(size) for size in fields["shape"])
            sketch = _decoded(fields["sketch"], "<f4", _WIDTH * _WIDTH)
            columns, rows = (
                _decoded(fields[key], "<f2", _LEVELS).astype(np.float32) if key in fields else None
                for key in ("columns", "rows")
            )
            norm = float(fields["norm"])
            dtype = str(fields["dtype"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a fingerprint: {error!r}") from error
        if not 0 <= norm < float("inf"):
            raise ValueError("not a fingerprint: a norm that is none")
        return cls((out_features, in_features), dtype, norm, sketch, columns, rows)

    def distance(self, other: Fingerprint) -> float:
        """Estimated Frobenius distance of the two weights over the norm of the larger; inf for other shapes."""
        if self.shape != other.shape:
            return float("inf")
        scale = max(self.norm, other.norm)
        difference = self.sketch.astype(np.float64) - other.sketch.astype(np.float64)
        return float(np.linalg.norm(difference) / _WIDTH / scale) if scale else 0.0

    def cosine(self, other: Fingerprint) -> float:
        """Cosine of the two sketches: 1 of weights that differ by a factor, 0 give or take 1/4 of unrelated ones."""
        one, two = self.sketch.astype(np.float64), other.sketch.astype(np.float64)
        scale = float(np.linalg.norm(one) * np.linalg.norm(two))
        return float(one @ two) / scale if scale else 0.0

    @property
    def tolerance(self) -> float:
        """The relative distance that storing the weight in its dtype can cause."""
        return TOLERANCE.get(self.dtype, _TOLERANCE_OTHER)

    def agrees(self, other: Fingerprint) -> bool:
        """Whether the two can be one weight, stored in the dtypes that they name."""
        return self.distance(other) <= max(self.tolerance, other.tolerance)


def _coded(numbers: np.ndarray, dtype: str) -> str:
    return base64.b64encode(numbers.astype(dtype).tobytes()).decode()


def _decoded(text: Any, dtype: str, count: int) -> np.ndarray:
    numbers: np.ndarray = np.frombuffer(base64.b64decode(text, validate=True), dtype)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"not {count} numbers, or not finite")
    return numbers


def fingerprint(weight: Tensor) -> Fingerprint:
    """Take the fingerprint of a weight [out_features, in_features], on its device, by chunks of rows.

    Dtype: float32 products on a CPU (or where there is no float64), float64 on a CUDA GPU, whose float32 products
    may be TF32, and for float64 weights; sums over chunks are float64.
    """
    return _of_blocks([weight], weight.shape[0], weight)


def fingerprint_of(target: Target, with_levels: bool = True) -> Fingerprint:
    """The fingerprint of the base weight of a target; its experts, if any, count as rows after each other.

    A weight that can't be read (quantised) is judged by what its module does to the columns of R; its norm is an
    estimate then.  Of a module that computes something else than W x + c the dtype is "output".

    Args:
        target: the weight.
        with_levels: files need them; to compare two weights (`agrees`) they are not needed, and take longest.
    """
    weight = target.weight
    if weight is not None:
        return _of_blocks(target.blocks(), target.out_features, weight, with_levels)
    return _of_effect(target) if target.dims is not None else _of_output(target)


def _of_output(target: Target) -> Fingerprint:
    """Of a module that computes something else than W x + c: of what it has as `weight`, else of its effect."""
    sizes, stored = (target.out_features, target.in_features), target.module._parameters.get("weight")
    if stored is not None and is_plain(stored) and tuple(stored.shape) in (sizes, sizes[::-1]):
        rows = whole(stored.detach())
        known = fingerprint(rows if tuple(stored.shape) == sizes else rows.T)
    else:
        known = _of_effect(target)
    return dataclasses.replace(known, dtype=OUTPUT)


def fingerprint_of_values(values: Tensor) -> Fingerprint:
    """The fingerprint of a floating tensor of any shape: [n] counts as [n, 1], other axes as columns."""
    rows = values.shape[0] if values.ndim else 1
    known = fingerprint(values.detach().reshape(rows, -1))
    return dataclasses.replace(known, columns=None, rows=None)  # nothing is folded beside such a tensor


def _of_blocks(blocks: Iterable[Tensor], rows: int, stored: Tensor, with_levels: bool = True) -> Fingerprint:
    dtype = torch.float64 if stored.dtype == torch.float64 or stored.is_cuda else torch.float32
    left = torch.from_numpy(signs(rows, 0))
    sketch = left.new_zeros(_WIDTH, _WIDTH)
    square, done, columns = 0.0, 0, 0
    by_row, by_column = left.new_zeros(rows), left.new_zeros(())
    with torch.no_grad(), no_autocast():
        for block in blocks:
            if block.is_meta:
                raise StateError(
                    f"a weight {list(block.shape)} is on the meta device and has no numbers, so which base it is "
                    "can't be told: load the base's weights first (load_state_dict(..., assign=True)), then the adapter"
                )
            columns = block.shape[1]
            right = torch.from_numpy(signs(columns, 1).T.copy()).to(block.device, dtype)  # [4, columns], see below
            step = max(1, _CHUNK // max(1, columns))
            for start in range(0, block.shape[0], step):
                chunk = block[start : start + step].to(dtype)
                if not math.isfinite(norm := torch.linalg.vector_norm(chunk).item()):
                    chunk = chunk.nan_to_num(0.0, 0.0, 0.0)
                    norm = torch.linalg.vector_norm(chunk.cpu().double()).item()
                # As `chunk @ R` it takes three times as long on a CPU: four columns are few for that kernel.
                sketch += left[done : done + len(chunk)].T @ linear(chunk, right).cpu().double()
                square += norm**2
                if with_levels:
                    squares = chunk.square()
                    by_row[done : done + len(chunk)] = squares.sum(1).cpu().double()
                    by_column = by_column + squares.sum(0).cpu().double()
                done += len(chunk)
    name = str(stored.dtype).removeprefix("torch.")
    known = Fingerprint((rows, columns), name, square**0.5, sketch.flatten().numpy().astype(np.float32))
    if not with_levels or min(rows, columns) < _LEAST:
        return known
    return dataclasses.replace(known, columns=levels(by_column.numpy(), 2), rows=levels(by_row.numpy(), 3))


def levels(squares: np.ndarray, stream: int) -> np.ndarray:
    """The levels of the columns (stream 2) or rows (stream 3) of a weight, by their squared norms [n].

    Returns:
        float32 [16], rounded to float16 as files hold them; zeros of a weight of zeros, or one that is not finite.
    """
    mean = squares.mean()
    found = np.log(squares / mean + _FAINT) / 2 if 0 < mean < np.inf else np.zeros(len(squares))
    projected = signs(len(found) * _LEVELS // _WIDTH, stream).reshape(-1, _LEVELS).T @ (found - found.mean())
    numbers: np.ndarray = (projected / len(found) ** 0.5).astype(np.float16).astype(np.float32)
    return numbers


def _of_effect(target: Target) -> Fingerprint:
    rows, columns = target.out_features, target.in_features
    seen = base_effect(target.module, torch.from_numpy(signs(columns, 1)).T.float())  # (W R)ᵀ, float64 [4, rows]
    sketch = (torch.from_numpy(signs(rows, 0)).T @ seen.T).flatten().numpy().astype(np.float32)
    # The expected square of |W r| over random signs r is the square of the Frobenius norm of W.
    return Fingerprint((rows, columns), "quantized", seen.norm().item() / _WIDTH**0.5, sketch)


@functools.lru_cache(maxsize=64)
def signs(rows: int, stream: int) -> np.ndarray:
    """Fixed random signs, float64 [rows, 4]; the first rows do not depend on how many are asked for.

    From the raw words of PCG64, which NumPy's compatibility policy keeps the same for ever (its distributions
    may change).
    """
    words = np.random.PCG64([2503_08333, stream]).random_raw((rows * _WIDTH + 63) // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: rows * _WIDTH]
    return np.where(bits == 1, 1.0, -1.0).reshape(rows, _WIDTH)
