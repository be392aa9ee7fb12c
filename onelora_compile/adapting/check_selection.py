"""Refusing a selection that can't be meant: names that match nothing, nothing left, modules that can't be adapted."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from onelora_compile.adapting.candidates import Candidate
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.dispatched import own_forward
from onelora_compile.adapting.module_names import any_match
from onelora_compile.adapting.weight_target import Target
from onelora_compile.errors import TargetError
from onelora_compile.printable import shortened


def check_names_match(
    config: OneLoRAConfig, names: dict[nn.Module, list[str]], candidates: dict[str, Candidate]
) -> None:
    """Every name in a list must match: a typing error would leave a layer unadapted without a word."""
    linears = [key for key, candidate in candidates.items() if candidate.target and not candidate.reason]
    for field in ("target_modules", "exclude_modules"):
        patterns = getattr(config, field)
        if patterns is None or isinstance(patterns, str):
            continue
        for pattern in patterns:
            hits = {key: c for key, c in candidates.items() if any_match([pattern], c.names)}
            if any(candidate.target for candidate in hits.values()):
                continue
            modules = (aliases[0] for aliases in names.values() if any_match([pattern], aliases))
            other = [f"{name!r} ({type(m).__name__})" for name, m in _by_name(names, modules)]
            why = [f"{key!r}: {candidate.reason}" for key, candidate in hits.items()]
            found = (
                f"only {shortened(why, 30)}"
                if why
                else f"only {shortened(other, 30)}, not a linear"
                if other
                else "no module"
            )
            raise TargetError(f"{field}: {pattern!r} matches {found}. The linears of this model: {_offer(linears)}")


def _by_name(names: dict[nn.Module, list[str]], wanted: Iterable[str]) -> list[tuple[str, nn.Module]]:
    first = {aliases[0]: module for module, aliases in names.items()}
    return [(name, first[name]) for name in wanted]


def nothing_selected(
    model: nn.Module, config: OneLoRAConfig, skipped: dict[str, str], not_linear: dict[str, str]
) -> str:
    """Why a configuration selects nothing: every linear of the model with the reason."""
    if not skipped:
        other = shortened([f"{name!r} is {what}" for name, what in not_linear.items()], 5)
        return (
            f"{type(model).__name__} holds no linear module (nn.Linear, a subclass of it, Conv1D, or what behaves like "
            "one), and no module in it was seen to use a parameter as the weight of a linear op"
            + (f"; {other}" if other else "")
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    listed = "; ".join(f"{reason}: {_offer(names)}" for reason, names in reasons.items())
    return (
        f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}, "
        f"modules_to_save={config.modules_to_save!r} select no linear of {type(model).__name__}. "
        f"Its linears, by the endings that select them: {listed}"
    )


def check_adaptable(key: str, target: Target, from_above: set[nn.Module]) -> None:
    """A vector here must get to every call of its module, and have a size.

    Raises:
        TargetError: the module has no shape yet, or something outside its class runs its forward or moves its weights.
    """
    module = target.module
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise TargetError(f"{key!r} is a {type(module).__name__} without a shape yet: run the model once, then adapt")
    if target.called and own_forward(module) is not None:
        # An instance's own forward hides the class's, where the update is: the vector would be dead.
        raise TargetError(
            f"{key!r} has a forward of its own on the instance, which hides the class's (transformers' tp_plan and "
            "diffusers' hooks for layerwise casting and offloading put one there): adapt the model first and do that "
            "afterwards, or leave the module out with exclude_modules"
        )
    if module in from_above:
        raise TargetError(
            f"{key!r} gets its weights from the accelerate hook of a module around it (preload_module_classes), which "
            "would put the vector away too: dispatch the model without that, or leave the module out with "
            "exclude_modules"
        )


def _offer(names: Iterable[str]) -> str:
    """The linears as the endings that select them, with how many each selects."""
    counts: dict[str, int] = {}
    for name in names:
        last = name.rpartition(".")[2]
        # 'blocks.0.mlp.2' is better offered by its parent than as '2'.
        ending = ".".join(name.split(".")[-2:]) if last.isdigit() else last
        counts[ending] = counts.get(ending, 0) + 1
    return shortened([f"{name} (x{count})" if count > 1 else name for name, count in sorted(counts.items())], 30)
