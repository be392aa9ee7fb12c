"""Find the weight of a vector in parts, which a tool computed where the model cuts it along its outputs.

    W [out_features, in_features]   ->   W[:a], W[a:b], W[b:], each a constant of its own, stored transposed or not

A fingerprint does not tell what is a part of a weight, but it does tell parts that together are all of it.  Exporters
write these one behind another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from onelora_compile.exporters.fold.find_weights import Weight
from onelora_compile.exporters.fold.layout import lies_turned
from onelora_compile.exporters.fold.places import Group, Place, projected
from onelora_compile.weights.fingerprint import TOLERANCE, signs

_Part = tuple[Weight, bool, np.ndarray]  # a weight, whether it is stored transposed, its W R [rows, 4]


def places_in_parts(weights: Sequence[Weight], groups: Iterable[Group]) -> Iterator[tuple[str, Place]]:
    """Each vector whose fingerprint fits several weights that follow on each other, at each of them.

    Args:
        weights: that no vector fits alone; those of one size are read again.
        groups: the fingerprints of the vectors without a place.
    """
    for group in groups:
        rows, columns = group.shape
        fitting = [
            (weight, transposed)
            for weight in weights
            if (transposed := _transposed(weight, columns)) is not None
            and weight.shape[transposed] < rows
            and all(use.linear for use in weight.uses)
        ]
        parts = [(weight, turned, projected(weight, turned)) for weight, turned in fitting] if len(fitting) > 1 else []
        for run in _runs(parts, rows):
            for name in _fitting(run, group):
                first = 0
                for weight, transposed, found in run:
                    yield name, Place(weight, transposed, 0, (len(found), columns), 1.0, (), first)
                    first += len(found)


def _transposed(weight: Weight, columns: int) -> bool | None:
    """Whether a weight of this many inputs is stored transposed.

    None if it has another number of them or is quantised, or if it is square and the ops do not tell.
    """
    found = [turned for turned in (False, True) if weight.shape[not turned] == columns and not weight.quantized]
    return lies_turned(weight.uses) if len(found) == 2 else next(iter(found), None)


def _runs(parts: Sequence[_Part], rows: int) -> Iterator[Sequence[_Part]]:
    """Parts that follow on each other and together have so many rows."""
    ends = np.cumsum([0, *(len(found) for _, _, found in parts)])
    at = {end: number for number, end in enumerate(ends)}
    for number, start in enumerate(ends):
        if (end := at.get(start + rows)) is not None:
            yield parts[number:end]


def _fitting(run: Sequence[_Part], group: Group) -> list[str]:
    """The vectors whose fingerprint is that of all parts together."""
    sketch = (signs(group.shape[0], 0).T @ np.concatenate([found for _, _, found in run])).flatten()
    allowed = np.maximum(max(TOLERANCE.get(weight.dtype, 0.25) for weight, _, _ in run), group.tolerances)
    distances = np.linalg.norm(sketch - group.sketches, axis=1) / 4
    fits = (distances <= allowed * group.norms) & (group.norms > 0)
    return [group.names[index] for index in np.flatnonzero(fits)]
