"""Where in a weight a vector's base is: the search by numbers.

A place is rows of a weight, or columns of one that is stored transposed, whose sketch is that of the fingerprint times
a factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from onelora_compile.exporters.fold.find_weights import Weight, WeightUse
from onelora_compile.exporters.fold.layout import is_own_transpose, lies_turned
from onelora_compile.exporters.onnx_file.load import as_torch
from onelora_compile.exporters.quantized.later_scales import as_stored
from onelora_compile.weights.fingerprint import OUTPUT, TOLERANCE, Fingerprint, signs

_PARTS = 4096  # of a weight that are tried
_CHANCE = 1e-8  # that numbers agree which have nothing to do with each other; a file has millions of rows
# What quantising a weight moves it by (relative Frobenius norm), with a margin: int8 0.005, int4 0.09 measured.
_QUANTIZED = {"int16": 1e-3, "uint16": 1e-3, "int8": 0.05, "uint8": 0.05, "int4": 0.25, "int2": 0.5}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a vector goes.

    Attributes:
        weight: the weight.
        transposed: whether it is stored as [in_features, out_features].
        start: the first of its rows (columns, if transposed).
        base: (out_features, in_features) of the base's weight, or of a part of it; as many rows are the vector's.
        factor: the weight is this times the base's, and so must the vector be.
        uses: which uses of the weight; all of them, as far as names can tell.
        first: the first of the vector's entries, where the weight is a part of the base's.
        distance: estimated relative Frobenius distance of the weight, less the factor, from the base's.
    """

    weight: Weight
    transposed: bool
    start: int
    base: tuple[int, int]
    factor: float
    uses: tuple[WeightUse, ...]
    first: int = 0
    distance: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether the vector is that of all rows."""
        return self.base == (self.weight.shape[::-1] if self.transposed else self.weight.shape)

    @property
    def rows(self) -> int:
        """How many rows (columns, if transposed) are the vector's."""
        return self.base[0]

    @property
    def entries(self) -> slice:
        """Which entries of the vector go there."""
        return slice(self.first, self.first + self.rows)


@dataclasses.dataclass(frozen=True)
class Group:
    """The fingerprints of one shape, as arrays: thousands of vectors are compared with thousands of weights.

    Attributes:
        shape: (out_features, in_features).
        names: of the vectors.
        sketches: float64 [vectors, 16].
        norms: Frobenius norms [vectors].
        tolerances: by the dtypes that the fingerprints were taken in [vectors].
        nearest: the smallest distance to a weight of this shape so far [vectors]; changed as weights are read.
    """

    shape: tuple[int, int]
    names: list[str]
    sketches: np.ndarray
    norms: np.ndarray
    tolerances: np.ndarray
    nearest: np.ndarray


def by_shape(prints: Mapping[str, Fingerprint]) -> list[Group]:
    """Fingerprints by their shapes, without those of modules of which only the output is adapted."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, one in prints.items():
        if one.dtype != OUTPUT:
            by_shape.setdefault(one.shape, []).append(name)
    groups = []
    for shape, names in by_shape.items():
        known = [prints[name] for name in names]
        sketches = np.stack([one.sketch.astype(np.float64) for one in known])
        tolerances = np.array([TOLERANCE.get(one.dtype, 0.25) for one in known])
        norms = np.array([one.norm for one in known])
        groups.append(Group(shape, names, sketches, norms, tolerances, np.full(len(names), np.inf)))
    return groups


def places_in(weight: Weight, groups: Sequence[Group]) -> Iterable[tuple[str, Place]]:
    """Each vector whose fingerprint fits the weight, at every place where it does."""
    square, found = weight.shape[0] == weight.shape[1], False
    told = lies_turned(use for use in weight.ways if use.linear)
    multiples = [one for use in weight.uses if use.product is not None for one in use.product.multiples]
    for transposed in (bool(told), not told):
        if square and found and (told is not None or not is_own_transpose(weight)):
            break  # it can't be its transpose too, or the ops say which it is
        out, columns = weight.shape[::-1] if transposed else weight.shape
        fitting = [group for group in groups if group.shape[1] == columns and group.shape[0] <= out]
        if not fitting:
            continue
        rows = projected(weight, transposed)
        for group in fitting:
            for index, start, factor, distance in _fits(rows, group, weight.dtype, multiples):
                found = True
                factor = as_stored(factor, multiples)
                place = Place(weight, transposed, start, group.shape, factor, (), distance=distance)
                yield group.names[index], place


def projected(weight: Weight, transposed: bool) -> np.ndarray:
    """W R [out_features, 4] of a weight, stored transposed or not, float64; float32 sums over parts of its rows."""
    right = torch.from_numpy(signs(weight.shape[0 if transposed else 1], 1))
    parts = []
    for start, numbers in weight.by_rows():
        part = as_torch(numbers)
        part = part if part.dtype == torch.float64 else part.float()
        part = part.nan_to_num(0.0, 0.0, 0.0)  # as the fingerprint counts them
        if transposed:
            parts.append((right[start : start + len(part)].to(part.dtype).T @ part).T.double())
        else:
            parts.append((part @ right.to(part.dtype)).double())
    return np.ascontiguousarray((sum(parts[1:], parts[0]) if transposed else torch.cat(parts)).numpy())


def _fits(
    projected: np.ndarray, known: Group, dtype: str, multiples: Sequence[float]
) -> Iterator[tuple[int, int, float, float]]:
    """Where the sketches fit: which, from which row on, with which factor, how far from it."""
    rows = known.shape[0]
    step = int(np.gcd(len(projected), rows))  # q, k and v of a packed weight start at multiples of it
    if len(projected) // step > _PARTS:
        return
    left, sketches, norms = signs(rows, 0), known.sketches, known.norms
    squares = np.square(sketches).sum(1)
    allowed = np.maximum(TOLERANCE.get(dtype, _QUANTIZED.get(dtype, 0.25)), known.tolerances)
    whole, numbers = rows == len(projected), min(rows, 4) * min(known.shape[1], 4)  # of a sketch, that are its own
    # Of a few numbers any others are nearly a multiple, or nearly these: then it must be all of a weight, as it is.
    many, enough = allowed ** (numbers - 1) <= _CHANCE, allowed**numbers <= _CHANCE
    for start in range(0, len(projected) - rows + 1, step):
        found = (left.T @ projected[start : start + rows]).flatten()
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # bases of zeros, damaged weights
            factor = sketches @ found / squares
            distance = np.linalg.norm(found - factor[:, None] * sketches, axis=1) / 4 / (np.abs(factor) * norms)
            plain = np.linalg.norm(found - sketches, axis=1) / 4 / norms
        distance = np.where(np.isfinite(distance), distance, np.inf)
        # A factor costs nothing only where the fit without it is no better.
        as_it_is = plain <= np.maximum(distance * 2, 1e-5)
        factor, distance = np.where(as_it_is, 1.0, factor), np.where(as_it_is, plain, distance)
        distance[squares == 0] = np.inf if found.any() else 0.0  # a base of zeros
        factor[squares == 0] = 1.0
        if whole:
            np.minimum(known.nearest, distance, out=known.nearest)
        exact = np.abs(factor - 1) <= np.maximum(allowed, 1e-4)
        told = exact.copy()  # a factor that the file holds is no chance
        for one in multiples:
            told |= np.abs(factor - one) <= allowed * abs(one)
        for index in np.flatnonzero((distance <= allowed) & (told | many) & (whole | enough)):
            yield int(index), start, 1.0 if exact[index] else float(factor[index]), float(distance[index])
