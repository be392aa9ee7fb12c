"""Whether adapters are of one base, from their files alone, and what they say of it together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from onelora_compile.errors import AdapterFileError, BaseMismatchError
from onelora_compile.printable import percent, shortened
from onelora_compile.weights.adapter_content import AdapterFile, Layer
from onelora_compile.weights.fingerprint import Fingerprint


@dataclasses.dataclass(frozen=True)
class Term:
    """An adapter and its weight in a sum.

    Attributes:
        name: what the call named it by: a path.
        weight: by which it is multiplied.
        file: what it holds.
    """

    name: str
    weight: float
    file: AdapterFile


def check_same_layers(terms: Sequence[Term]) -> None:
    """Check that vectors of one name are on layers of one kind and size.

    Raises:
        AdapterFileError: they are not.
    """
    for name in all_names(term.file.vectors for term in terms):
        first, *others = (term for term in terms if name in term.file.vectors)
        for other in others:
            one, two = first.file.vectors[name].shape, other.file.vectors[name].shape
            if one != two:
                raise _differ(name, first, other, f"a vector of {list(one)}", f"{list(two)}")
        for what, known in (("of kind", _kind), ("of in_features", _row)):
            told = [(term, found) for term in (first, *others) if (found := known(term.file, name)) is not None]
            for term, found in told[1:]:
                if found != told[0][1]:
                    raise _differ(name, told[0][0], term, f"a layer {what} {told[0][1]}", f"{found}")


def _kind(file: AdapterFile, name: str) -> str | None:
    layer = file.layers.get(name)
    return None if layer is None else layer.kind


def _row(file: AdapterFile, name: str) -> int | None:
    """The numbers in one row of W, as far as the file tells."""
    layer, known = file.layers.get(name), file.fingerprints.get(name)
    if layer is not None and layer.inputs is not None:
        return prod(layer.inputs)
    return None if known is None else known.shape[1]


def _differ(name: str, one: Term, other: Term, first: str, second: str) -> AdapterFileError:
    return AdapterFileError(
        f"{name!r} has {first} in {one.name} and {second} in {other.name}: they are adapters of different models"
    )


def same_weights(terms: Sequence[Term]) -> dict[str, Fingerprint]:
    """The fingerprint of the base weight of each vector that any adapter knows.

    Raises:
        BaseMismatchError: two adapters were trained on different weights.
    """
    found, wrong = agreed({term.name: term.file.fingerprints for term in terms})
    if wrong:
        (one, other), names = next(iter(wrong.items()))
        raise BaseMismatchError(
            f"{one} and {other} were trained on different bases: {shortened(names, 5)}. Only adapters of one base add"
        )
    return found


def agreed(
    prints: Mapping[str, Mapping[str, Fingerprint]],
) -> tuple[dict[str, Fingerprint], dict[tuple[str, str], list[str]]]:
    """What several files say of the same tensors, as one.

    Args:
        prints: the fingerprints of each file.

    Returns:
        Of each tensor the fingerprint from the most precise dtype, whichever file it is in. And what differs, with the
        distance, by the two files.
    """
    best: dict[str, tuple[str, Fingerprint]] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    for file, known in prints.items():
        for name, here in known.items():
            owner, there = best.get(name, (file, here))
            if not here.agrees(there):
                wrong.setdefault((owner, file), []).append(f"{name} ({_difference(here, there)})")
            if name not in best or here.tolerance < there.tolerance:
                best[name] = (file, here)
    return {name: known for name, (_, known) in best.items()}, wrong


def _difference(one: Fingerprint, other: Fingerprint) -> str:
    if one.shape != other.shape:
        return f"{list(other.shape)} and {list(one.shape)}"
    return f"differs by {percent(one.distance(other))}"


def not_compared(terms: Sequence[Term]) -> list[str]:
    """The adapters whose base could not be compared with that of most others: no fingerprint is in common."""
    groups: list[tuple[list[str], set[str]]] = []
    for term in terms:
        members, names = [term.name], set(term.file.fingerprints)
        for group in [group for group in groups if group[1] & names]:
            groups.remove(group)
            members, names = [*group[0], *members], group[1] | names
        groups.append((members, names))
    most = max(groups, key=lambda group: len(group[0]))
    alone = len(terms) > 1 and len(most[0]) == 1
    return [name for group in groups if alone or group is not most for name in group[0]]


def layers_together(files: Sequence[AdapterFile]) -> dict[str, Layer]:
    """What each vector is on; empty where of any vector no file tells, as an adapter file can't say so of some."""
    found: dict[str, Layer] = {}
    for file in files:
        for name, layer in file.layers.items():
            known = found.get(name)
            found[name] = layer if known is None or known.inputs is None else known
    return found if set(found) >= set(all_names(file.vectors for file in files)) else {}


def uses_together(files: Iterable[AdapterFile]) -> dict[str, tuple[int, int]]:
    """How often a weight is used, as the strictest file says.

    The strictest is 0 at most, which is no count, then a negative number, which is no bound.
    """
    found: dict[str, tuple[int, int]] = {}
    for file in files:
        for name, (least, most) in file.uses.items():
            a, b = found.get(name, (least, most))
            larger = max(abs(b), abs(most)) if b and most else 0
            found[name] = (min(a, least), larger if min(b, most) > 0 else -larger)
    return found


def aliases_together(files: Iterable[AdapterFile]) -> dict[str, tuple[str, ...]]:
    """The other names of what is tied."""
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        for name, others in file.aliases.items():
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), *others)))
    return found


def all_names(parts: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once, in the order of their first place."""
    return list(dict.fromkeys(name for part in parts for name in part))
