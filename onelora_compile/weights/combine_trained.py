"""Heads, norms and statistics in a sum of adapters: they replace base values, so what adds is value - base value.

    base + Σ wᵢ (valueᵢ - base)  =  Σ wᵢ valueᵢ + (1 - Σ wᵢ) base

Adapter files have no base values. None is needed where the weights of those that trained a tensor add up to 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from onelora_compile.errors import AdapterFileError, BaseMismatchError, ConfigError
from onelora_compile.printable import shortened
from onelora_compile.weights.fingerprint import Fingerprint
from onelora_compile.weights.same_base import Term, agreed, aliases_together, all_names

REFUSE, DROP, ADD, FROM = "refuse", "drop", "add", "from:"
BaseValue = Callable[[str, Sequence[str], Fingerprint | None], Tensor]
_ROUNDING = 1e-12  # of weights such as 0.1 ten times, whose sum is meant to be 1
_COUNTER = ".num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class TrainedSum:
    """What a sum holds besides vectors, as the fields of `AdapterFile` and of its configuration."""

    saved: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    bases: dict[str, Fingerprint] = dataclasses.field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    train_norms: bool = False


def combined_trained(terms: Sequence[Term], trained: str, base_value: BaseValue | None) -> TrainedSum:
    """What becomes of what the adapters trained besides vectors.

    Args:
        terms: the adapters.
        trained: REFUSE, DROP, ADD, or FROM and the name of one of them.
        base_value: the value that a tensor had before training, checked.

    Raises:
        ConfigError: an unknown word; there is something, and no word for it; a base value is needed.
        AdapterFileError: it does not add.
        BaseMismatchError: it was trained from different values.
    """
    holding = [term for term in terms if term.file.saved]
    if trained.startswith(FROM):
        found = _as_trained([_named(terms, trained.removeprefix(FROM))])
    elif trained == DROP or not holding:
        return TrainedSum()
    elif trained == ADD:
        found = _as_trained(holding)
        found = dataclasses.replace(found, saved=_added(holding, found, base_value))
    else:
        raise ConfigError(_question(holding))
    _check_places(found, terms)
    return found


def check_word(trained: str) -> None:
    """Check what `combine` is told to do with what was trained besides vectors.

    Raises:
        ConfigError: it is no such word.
    """
    if not isinstance(trained, str) or (trained not in (REFUSE, DROP, ADD) and not trained.startswith(FROM)):
        raise ConfigError(
            f"trained={trained!r} is not one of {REFUSE!r}, {DROP!r}, {ADD!r}, or '{FROM}' and one of the adapters"
        )


def _question(holding: Sequence[Term]) -> str:
    names = all_names(term.file.saved for term in holding)
    return (
        f"{shortened((term.name for term in holding), 3)} trained {shortened(names, 4)} besides vectors (heads, norms, "
        f"statistics of batch norms), which replace values of the base: say what becomes of them. trained={DROP!r} "
        f"leaves the base's, '{FROM}{holding[0].name}' takes that file's, {ADD!r} adds what training changed "
        "(--trained in a shell)"
    )


def _named(terms: Sequence[Term], name: str) -> Term:
    for term in terms:
        if name and Path(term.name) == Path(name):
            if not term.file.saved:
                raise ConfigError(f"trained='{FROM}{name}': {name} trained nothing besides vectors: {DROP!r} says that")
            return term
    raise ConfigError(f"trained='{FROM}{name}' is none of the adapters: {shortened(term.name for term in terms)}")


def _as_trained(terms: Sequence[Term]) -> TrainedSum:
    """What adapters say of what they trained, with the values of the first."""
    files = [term.file for term in terms]
    bases, wrong = agreed({term.name: term.file.bases for term in terms})
    if wrong:
        (one, other), names = next(iter(wrong.items()))
        raise BaseMismatchError(
            f"{one} and {other} trained {shortened(names, 5)} from different values, so what training changed does not "
            f"add: a new head begins at random in every program. Take one ('{FROM}{one}') or none ({DROP!r})"
        )
    return TrainedSum(
        files[0].saved,
        bases,
        aliases_together(files),
        tuple(all_names(file.config.modules_to_save for file in files)),
        any(file.config.train_norms for file in files),
    )


def _added(terms: Sequence[Term], known: TrainedSum, base_value: BaseValue | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in all_names(term.file.saved for term in terms):
        held = [term for term in terms if name in term.file.saved]
        values = [term.file.saved[name] for term in held]
        if len(shapes := {tuple(value.shape) for value in values}) > 1:
            raise AdapterFileError(f"{name!r} has different shapes in the adapters: {sorted(shapes)}")
        if not all(value.is_floating_point() for value in values):
            found |= _counted(name, values)
            continue
        parts = [(term.weight, value) for term, value in zip(held, values, strict=True)]
        rest = 1 - math.fsum(term.weight for term in held)
        needed = abs(rest) > _ROUNDING
        if needed or len(held) > 1:
            _check_begin(name, held)
        if needed:
            parts.append((rest, _base_of(name, held, known, base_value)))
        found[name] = weighted_sum(parts, functools.reduce(torch.promote_types, [value.dtype for value in values]))
        if name.endswith(".running_var") and bool((found[name] < 0).any()):
            raise AdapterFileError(f"{name!r} would have negative variances: take those of one adapter ('{FROM}…')")
    return found


def _check_begin(name: str, held: Sequence[Term]) -> None:
    """Whether files know what a tensor was before training, as a new head is another one in every program."""
    if unknown := [term.name for term in held if name not in term.file.bases]:
        raise AdapterFileError(
            f"{shortened(unknown, 3)} does not tell from which values {name!r} was trained, as PEFT and older versions "
            "do not, so whether what training changed adds is not known. Load it into the base model and save it, "
            f"onelora.load_adapter and onelora.save_adapter, or take one ('{FROM}{held[0].name}') or none ({DROP!r})"
        )


def _base_of(name: str, held: Sequence[Term], known: TrainedSum, base_value: BaseValue | None) -> Tensor:
    """What a tensor was before training."""
    if base_value is None:
        weights = ", ".join(f"{term.weight:g}" for term in held)
        raise ConfigError(
            f"{name!r}: the weights of those that trained it ({weights}) do not add up to 1, so the base's value is "
            "needed, and adapter files have none: give base= (--base), a .safetensors file of the base or its "
            "state_dict, or weights that add up to 1"
        )
    value = base_value(name, known.aliases.get(name, ()), known.bases.get(name))
    if value.shape != held[0].file.saved[name].shape:
        raise BaseMismatchError(
            f"base: {name!r} is {list(value.shape)}, and {list(held[0].file.saved[name].shape)} in {held[0].name}"
        )
    return value


def _counted(name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """What is no floating tensor: the same in all, or a counter of batches, which a model does without."""
    if all(torch.equal(values[0], value) for value in values):
        return {name: values[0]}
    if name.endswith(_COUNTER):
        return {}
    raise AdapterFileError(f"{name!r} is {values[0].dtype} and differs between the adapters: it does not add")


def _check_places(found: TrainedSum, terms: Sequence[Term]) -> None:
    """Whether a model can hold it all: a weight has a vector or is trained itself, and under one name."""
    tied = [
        (name, other) for name, others in found.aliases.items() for other in others if {name, other} <= {*found.saved}
    ]
    if tied:
        raise AdapterFileError(f"{tied[0][0]} and {tied[0][1]} are one parameter of the base, and both were trained")
    places = {other: name for name in found.saved for other in (name, *found.aliases.get(name, ()))}
    for name in all_names(term.file.vectors for term in terms):
        if own := places.get(f"{name}.weight".removeprefix(".")) or places.get(name):
            here = next(term.name for term in terms if name in term.file.vectors)
            there = next(term.name for term in terms if own in term.file.saved)
            raise AdapterFileError(
                f"{name!r} has a vector in {here}, and {there} trained the weight itself: one adapter can't hold both. "
                f"Leave out what was trained besides vectors ({DROP!r}), or one of the two"
            )


def weighted_sum(parts: Iterable[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    """Σ wᵢ tᵢ in float64, rounded once to `dtype`; of one tensor with weight 1 that tensor, bit for bit."""
    return functools.reduce(torch.add, [tensor.double() * weight for weight, tensor in parts]).to(dtype)
