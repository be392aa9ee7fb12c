"""Find in an ONNX model the weight of each vector of an adapter, by fingerprint.

Tools rename, transpose, pack, scale, copy and merge weights, so a name is only ever a hint.  A vector's place is
rows of a weight, or columns of one that is stored transposed, whose sketch is that of the fingerprint times a factor.
Names decide where several places hold the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onelora_compile.exporters.onnx_weights import Use, Weight
from onelora_compile.fingerprint import TOLERANCE, Fingerprint, signs

_PARTS = 4096  # of a weight that are tried
# What quantising a weight moves it by (relative Frobenius norm), with a margin: int8 0.005, int4 0.09 measured.
_QUANTIZED = {"int8": 0.05, "uint8": 0.05, "int4": 0.25, "int2": 0.5}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a vector goes.

    Attributes:
        weight: the weight.
        transposed: whether it is stored as [in_features, out_features].
        start: the first of its rows (columns, if transposed).
        rows: how many.
        factor: the weight is this times the base's, and so must the vector be.
        uses: which uses of the weight; all of them, as far as names can tell.
    """

    weight: Weight
    transposed: bool
    start: int
    rows: int
    factor: float
    uses: tuple[Use, ...]


@dataclasses.dataclass(frozen=True)
class Matches:
    """What was found.

    Attributes:
        places: of each vector; more than one where a tool wrote copies of the weight.
        unmatched: vectors without a place, with the reason.
        free: weights that no vector took, for messages.
        nearest: of an unmatched vector, the distance of the nearest weight of its shape.
    """

    places: dict[str, list[Place]]
    unmatched: dict[str, str]
    free: list[Weight]
    nearest: dict[str, float]


def match_weights(weights: Iterable[Weight], prints: Mapping[str, Fingerprint]) -> Matches:
    """Find the weight of each vector; every weight is read once."""
    found: dict[str, list[Place]] = {name: [] for name in prints}
    nearest: dict[str, float] = {}
    every = []
    for weight in weights:
        every.append(weight)
        for name, place, distance in _places(weight, prints):
            if place is None:
                nearest[name] = min(distance, nearest.get(name, np.inf))
            else:
                found[name].append(place)
    nearest = {name: distance for name, distance in nearest.items() if not found[name]}
    chosen: dict[str, list[Place]] = {}
    unmatched: dict[str, str] = {}
    for name, places in found.items():
        own = [dataclasses.replace(place, uses=_linear(place.weight)) for place in places if _linear(place.weight)]
        if not own:
            unmatched[name] = _reason(name, places, nearest)
            continue
        twins = [other for other in found if other != name and _overlap(own, found[other])]
        decided = _decided(name, own, twins)
        if decided is None:
            where = ", ".join(place.weight.name for place in own)
            others = f", as of {', '.join(twins)}" if twins else ""
            unmatched[name] = f"the same numbers are at {where}{others}, and no names tell them apart"
        else:
            chosen[name] = decided
    taken = {id(place.weight) for places in chosen.values() for place in places}
    return Matches(chosen, unmatched, [weight for weight in every if id(weight) not in taken], nearest)


def _places(weight: Weight, prints: Mapping[str, Fingerprint]) -> Iterable[tuple[str, Place | None, float]]:
    """Each vector whose fingerprint fits the weight somewhere; with None and the distance where only the size fits."""
    tolerance = TOLERANCE.get(weight.dtype, _QUANTIZED.get(weight.dtype, 0.25))
    numbers: np.ndarray | None = None
    for transposed in (False, True):
        out, columns = weight.shape[::-1] if transposed else weight.shape
        fitting = {name: one for name, one in prints.items() if one.shape[1] == columns and one.shape[0] <= out}
        if not fitting:
            continue
        if numbers is None:
            numbers = weight.read()
        wide = np.ascontiguousarray(numbers.T) if transposed and numbers.size < 1 << 16 else None
        projected = _projected(wide if wide is not None else numbers, transposed and wide is None)
        for name, known in fitting.items():
            allowed = max(tolerance, TOLERANCE.get(known.dtype, 0.25))
            start, factor, distance = _best(projected, known)
            if distance <= allowed:
                exact = abs(factor - 1) <= max(allowed, 1e-4)
                place = Place(weight, transposed, start, known.shape[0], 1.0 if exact else factor, ())
                yield name, place, distance
            elif known.shape[0] == out:
                yield name, None, distance


def _projected(numbers: np.ndarray, transposed: bool) -> np.ndarray:
    """W R [out_features, 4] of a weight, stored transposed or not, float64."""
    dtype = np.float64 if numbers.dtype == np.float64 else np.float32
    right: Any = signs(numbers.shape[0 if transposed else 1], 1).astype(dtype)
    step = max(1, (1 << 22) // max(1, numbers.shape[1]))
    parts = []
    for begin in range(0, numbers.shape[0], step):
        chunk = numbers[begin : begin + step].astype(dtype, copy=False)
        parts.append((right[begin : begin + step].T @ chunk).T if transposed else chunk @ right)
    return sum(part.astype(np.float64) for part in parts) if transposed else np.concatenate(parts).astype(np.float64)


def _best(projected: np.ndarray, known: Fingerprint) -> tuple[int, float, float]:
    """Where the sketch fits best: first row, factor, distance."""
    rows = known.shape[0]
    step = int(np.gcd(len(projected), rows))  # q, k and v of a packed weight start at multiples of it
    if len(projected) // step > _PARTS:
        return 0, 1.0, float("inf")
    left, sketch = signs(rows, 0), known.sketch.astype(np.float64)
    best = (0, 1.0, float("inf"))
    square = float(sketch @ sketch)
    for start in range(0, len(projected) - rows + 1, step):
        found = (left.T @ projected[start : start + rows]).flatten()
        if not square:  # a base of zeros
            if not found.any():
                return start, 1.0, 0.0
            continue
        factor = float(found @ sketch) / square
        if not np.isfinite(factor) or factor == 0:
            continue
        distance = float(np.linalg.norm(found - factor * sketch)) / 4 / (abs(factor) * known.norm)
        # A factor costs nothing only where the fit without it is no better.
        plain = float(np.linalg.norm(found - sketch)) / 4 / known.norm
        if plain <= max(distance * 2, 1e-5):
            factor, distance = 1.0, plain
        if distance < best[2]:
            best = (start, factor, distance)
    return best


def _linear(weight: Weight) -> tuple[Use, ...]:
    return tuple(use for use in weight.uses if use.linear)


def _overlap(places: Sequence[Place], others: Sequence[Place]) -> bool:
    return any(a.weight is b.weight and a.start == b.start for a in places for b in others)


def _decided(name: str, places: Sequence[Place], twins: Sequence[str]) -> list[Place] | None:
    """The places and uses that are the vector's, None where that can't be told.

    One place that no other vector has is its own, whatever it is called, but for uses that are called otherwise.
    """
    alone = not twins and len(places) == 1
    owners = {use: _owner(use, place.weight, (name, *twins)) for place in places for use in place.uses}
    if name not in owners.values():
        return list(places) if alone else None
    if not alone and any(owner is None for owner in owners.values()):
        return None
    mine = {use for use, owner in owners.items() if owner == name or (alone and owner is None)}
    kept = [dataclasses.replace(place, uses=tuple(use for use in place.uses if use in mine)) for place in places]
    return [place for place in kept if place.uses]


def _owner(use: Use, weight: Weight, names: Sequence[str]) -> str | None:
    """Which vector an op belongs to by the names that tools left: "" another one, None where they do not tell."""
    if use.modules:
        path = use.modules[-1]
    elif len(_linear(weight)) == 1 and weight.name.endswith(".weight"):
        path = weight.name.removesuffix(".weight")
    else:
        return None
    # A vector of a parameter that is read, "attention.in_proj_weight", belongs to the ops of "attention".
    for candidates in ({name: name for name in names}, {name.rpartition(".")[0]: name for name in names}):
        if path in candidates:
            return candidates[path]
        if inside := [one for one in candidates if _ends(path, one)]:
            return candidates[max(inside, key=len)]
    return ""


def _ends(path: str, name: str) -> bool:
    """Whether one path is the end of the other: tools add and drop what is around a model."""
    return bool(path) and bool(name) and (f".{path}".endswith(f".{name}") or f".{name}".endswith(f".{path}"))


def _reason(name: str, places: Sequence[Place], nearest: Mapping[str, float]) -> str:
    if places:
        ops = ", ".join(sorted({use.op.op_type for place in places for use in place.weight.uses})) or "nothing"
        return f"its weight is {places[0].weight.name!r}, which is not used by a linear op but by {ops}"
    if name in nearest:
        return f"no weight is its base's; the nearest of its shape differs by {nearest[name]:.1%}"
    return "no weight of its shape"
