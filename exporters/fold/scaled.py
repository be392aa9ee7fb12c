"""Tell a quantised weight whose columns or rows were scaled from one that was only rounded.

    W x   ->   (W S) (S⁻¹ x)     S⁻¹ in the norm or the linear before: SmoothQuant, AWQ

That is the base's function, and another one for a vector: S⁻¹ x has not the sum that was trained.  Rows that are scaled
give an output in other units than the vector's.  Few bits move a weight as far as mild factors do, so a distance does
not tell, but the norms of columns and rows do: rounding errors cancel in them.

What passes is harmless: such factors move an update by less than half of what rounding moves W x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onelora_compile.exporters.fold.places import Place
from onelora_compile.weights.fingerprint import Fingerprint, levels

# How much of the difference from the base's weight factors may be.  Rounding, GPTQ and clipping to 0.8 of the range
# look like 0.05 to 0.3 of it.  Both are estimates from 16 numbers, good to a quarter; those of n weights are better.
_SHARE, _ESTIMATE = 0.4, 0.4
_LEAST = 2e-3  # relative distance that storing the base in half precision gives
_TELLS = {
    "columns": "its input has not the sum that was trained any more",
    "rows": "its output is in other units than the vector",
}


@dataclasses.dataclass(frozen=True)
class _Measured:
    """How far columns or rows are scaled apart, and how far the weight is from the base's; both relative."""

    name: str
    place: Place
    apart: float
    distance: float

    def above(self, share: float) -> bool:
        return self.apart > share * self.distance


def scaled(places: Mapping[str, Sequence[Place]], prints: Mapping[str, Fingerprint]) -> dict[str, str]:
    """The vectors whose quantised weight was scaled before it was quantised, with the reason.

    A tool scales all weights or most, so they are judged together, and one alone only where it is plain.  Nothing is
    said of fingerprints without levels.
    """
    found: dict[str, str] = {}
    both = [pair for name, ones in places.items() for one in ones for pair in _measured(name, one, prints[name])]
    for at, what in enumerate(_TELLS):
        measured = [pair[at] for pair in both]
        for one in _scaled(measured):
            found.setdefault(one.name, _reason(one, what))
    return found


def _scaled(measured: Sequence[_Measured]) -> list[_Measured]:
    if not measured:
        return []
    together = np.sqrt(sum(one.apart**2 for one in measured) / sum(one.distance**2 for one in measured))
    share = _SHARE if together > _SHARE + _ESTIMATE / len(measured) else _SHARE + _ESTIMATE
    return [one for one in measured if one.above(share)]


def _measured(name: str, place: Place, known: Fingerprint) -> Iterator[tuple[_Measured, _Measured]]:
    """Of columns and of rows."""
    if not place.weight.quantized or known.columns is None or known.rows is None:
        return
    matrix = np.concatenate([part for _, part in place.weight.by_rows()])
    squares = np.square((matrix.T if place.transposed else matrix)[place.start : place.start + place.rows])
    columns, rows = (
        _Measured(name, place, float(np.sqrt(np.mean(np.square(here - there)))), max(place.distance, _LEAST))
        for here, there in (
            (levels(squares.sum(0, dtype=np.float64), 2), known.columns),
            (levels(squares.sum(1, dtype=np.float64), 3), known.rows),
        )
    )
    yield columns, rows


def _reason(one: _Measured, what: str) -> str:
    return (
        f"the {what} of its weight {one.place.weight.name!r} were scaled before it was quantised, by factors about "
        f"{one.apart:.1%} apart (SmoothQuant, AWQ): {_TELLS[what]}; fold first, then scale and quantise"
    )
