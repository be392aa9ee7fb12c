"""Find in an ONNX model the weight of each vector of an adapter, by fingerprint.

Tools rename, transpose, pack, scale, copy and merge weights, so a name is only ever a hint.  A vector's place is
rows of a weight, or columns of one that is stored transposed, whose sketch is that of the fingerprint times a factor.
Names decide where several places hold the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.exporters.fold.body_outputs import is_returned, reads_of_bodies
from onelora_compile.exporters.fold.find_weights import Weight, WeightUse
from onelora_compile.exporters.fold.owners import Known, decided
from onelora_compile.exporters.fold.parts import places_in_parts
from onelora_compile.exporters.fold.places import Place, by_shape, places_in
from onelora_compile.exporters.fold.scaled import scaled
from onelora_compile.weights.fingerprint import OUTPUT, Fingerprint

if TYPE_CHECKING:
    import onnx_ir

OUTPUT_ONLY = (
    "its module computes something else than W x + c (it scales, quantises or activates), so the vector, which adds to "
    "its output, can't go into a weight; export the model with adapters='input' or 'bank'"
)


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


def match_weights(weights: Iterable[Weight], prints: Mapping[str, Fingerprint], known: Known | None = None) -> Matches:
    """Find the weight of each vector; every weight is read once, and what may be a part of one again.

    Args:
        weights: of the model.
        prints: of the vectors' base weights.
        known: what tells equal weights apart besides names; None is the default config's.
    """
    known = known or Known()
    groups = by_shape(prints)
    found: dict[str, list[Place]] = {name: [] for name in prints}
    every = []
    for weight in weights:
        every.append(weight)
        for name, place in places_in(weight, groups):
            found[name].append(place)
    held = {id(place.weight) for places in found.values() for place in places}
    left = by_shape({name: one for name, one in prints.items() if not found[name]})
    for name, place in places_in_parts([weight for weight in every if id(weight) not in held], left):
        found[name].append(place)
    nearest = {
        name: float(distance)
        for group in groups
        for name, distance in zip(group.names, group.nearest, strict=True)
        if not found[name] and np.isfinite(distance)
    }
    chosen: dict[str, list[Place]] = {}
    unmatched: dict[str, str] = {}
    at: dict[tuple[int, int], set[str]] = {}  # weight and first row -> the vectors that fit there
    for name, places in found.items():
        for place in places:
            at.setdefault((id(place.weight), place.start), set()).add(name)
    for name, places in found.items():
        times = known.uses.get(name, (1, 1))
        own = list(_each_once(dataclasses.replace(place, uses=_linear(place, times)) for place in places))
        if not own:
            unmatched[name] = OUTPUT_ONLY if prints[name].dtype == OUTPUT else _reason(name, places, nearest, known)
            continue
        # Zeros are equal by chance, the numbers of a trained weight only as its copy.
        theirs = places if prints[name].norm else own
        served = {(use.op, use.position) for place in own for use in place.uses}
        if strange := [use for place in theirs for use in place.weight.uses if _strange(use, place, served)]:
            unmatched[name] = f"its weight {own[0].weight.name!r} also goes into {_ops(strange)}, which is not followed"
            continue
        if behind := _behind_bodies(theirs, known):
            unmatched[name] = f"its weight {own[0].weight.name!r} also goes into {behind}, which is not followed"
            continue
        there = set[str]().union(*(at[id(place.weight), place.start] for place in own))
        twins = [other for other in found if other in there and other != name] if len(there) > 1 else []
        chosen_or_why = decided(name, own, twins, known)
        if isinstance(chosen_or_why, str):
            unmatched[name] = chosen_or_why
        elif again := _again(chosen_or_why, places):
            unmatched[name] = again
        else:
            chosen[name] = chosen_or_why
    for refused in (_disputed, lambda ones: scaled(ones, prints)):
        for name, reason in refused(chosen).items():
            unmatched[name] = reason
            del chosen[name]
    taken = {id(place.weight) for places in chosen.values() for place in places}
    return Matches(chosen, unmatched, [weight for weight in every if id(weight) not in taken], nearest)


def _linear(place: Place, times: tuple[int, int]) -> tuple[WeightUse, ...]:
    """The uses that a vector there may go into; of parts only where it is the whole weight's.

    Rows that are picked may be looked up in an embedding, of which the base stays: the number of uses tells.
    """
    uses = tuple(use for use in (place.weight.ways if place.whole else place.weight.uses) if use.linear)
    return uses if (len(uses), len(uses)) == times else tuple(use for use in uses if not use.picked)


def _each_once(places: Iterable[Place]) -> Iterator[Place]:
    """Places with uses, each use in one: of a stored weight before those of what ops compute from it."""
    taken: set[tuple[onnx_ir.Node, int]] = set()
    for place in places:
        uses = tuple(use for use in place.uses if (use.op, use.position) not in taken)
        taken |= {(use.op, use.position) for use in uses}
        if uses:
            yield dataclasses.replace(place, uses=uses)


def _again(chosen: Sequence[Place], places: Sequence[Place]) -> str | None:
    """Why a place can't be chosen: the numbers are twice in its weight, or are their own transpose."""
    for place in chosen:
        here = [one for one in places if one.weight is place.weight]
        if len(here) > 1:
            where = ", ".join(f"{'columns' if one.transposed else 'rows'} from {one.start}" for one in here[:4])
            return f"its numbers are at several places in {place.weight.name!r} ({where}), and nothing tells which"
    return None


def _disputed(chosen: Mapping[str, Sequence[Place]]) -> dict[str, str]:
    """Vectors that would go into what one op reads by two weights, one computed from the other; with the reason."""
    claims: dict[tuple[onnx_ir.Node, int], dict[str, Weight]] = {}
    for name, places in chosen.items():
        for place in places:
            for use in place.uses:
                claims.setdefault((use.op, use.position), {})[name] = place.weight
    return {
        name: f"what {op.op_type} {op.name!r} reads can be any of {', '.join(weights)}, and nothing tells which"
        for (op, _), weights in claims.items()
        if len(set(map(id, weights.values()))) > 1
        for name in weights
    }


def _strange(use: WeightUse, place: Place, served: set[tuple[onnx_ir.Node, int]]) -> bool:
    """Whether an op needs the weight, and the vector goes not where it does: a mask on it, a row of its own."""
    return use.strange or (place.whole and use.takes_parts and not use.parts) or not served.issuperset(use.ends)


def _ops(uses: Sequence[WeightUse]) -> str:
    return ", ".join(sorted({use.op.op_type for use in uses}))


def _behind_bodies(places: Iterable[Place], known: Known) -> str:
    found = [read for place in places for read in reads_of_bodies(place.weight.value, known.bodies)]
    return "; ".join(dict.fromkeys(found))


def _reason(name: str, places: Sequence[Place], nearest: Mapping[str, float], known: Known) -> str:
    if places:
        by = [_ops([use for place in places for use in place.weight.uses]), _behind_bodies(places, known)]
        if any(is_returned(place.weight.value, known.bodies) for place in places):
            by.append("the output of the file that it is")
        read = "; ".join(one for one in by if one) or "nothing"
        return f"its weight is {places[0].weight.name!r}, which is not used by a linear op but by {read}"
    if name in nearest:
        return f"no weight is its base's; the nearest of its shape differs by {nearest[name]:.1%}"
    return "no weight of its shape"
