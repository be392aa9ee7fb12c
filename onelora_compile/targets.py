"""Which modules are adapted: PEFT's selection rules, with an answer for every module that is left out."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from onelora_compile.config import OneLoRAConfig
from onelora_compile.errors import TargetError
from onelora_compile.layer import is_linear

ALL_LINEAR = "all-linear"

# Heads that transformers puts beside the base model, as direct children of an `…For<Task>` class.
HEAD_NAMES = (
    "classifier",
    "cls_classifier",
    "distillation_classifier",
    "classification_head",
    "score",
    "qa_outputs",
    "lm_head",
)

OUTPUT_HEAD = "output head"
EXCLUDED = "excluded by exclude_modules"
SAVED = "trained as a whole by modules_to_save"
NOT_SELECTED = "not selected by target_modules"
READ_DIRECTLY = "nn.MultiheadAttention reads its weight without calling it: a vector on it would be dead"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a configuration means for one model.

    Attributes:
        targets: modules to adapt, by qualified name.
        saved: qualified names of the parameters that are trained as they are.
        skipped: every linear module that gets no vector, with the reason.
    """

    targets: dict[str, nn.Module]
    saved: list[str]
    skipped: dict[str, str]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by qualified name, each once, without the `_orig_mod` that `torch.compile` puts in between."""
    for name, module in model.named_modules():
        yield clean_name(name), module


def clean_name(name: str) -> str:
    """A qualified name as it is in the model that was not compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def select(model: nn.Module, config: OneLoRAConfig) -> Selection:
    """Apply the rules of `config` to the linears of `model`.

    Raises:
        TargetError: nothing is selected, a name in a list matches nothing, or a selected module can't be adapted.
    """
    # A module may be registered under several names: it is selected if any matches, and known by the first.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(clean_name(name))
    linears = {module: aliases for module, aliases in names.items() if is_linear(module)}

    saved_roots = _matching_roots(names, config.modules_to_save)
    saved_modules = {inner for root in saved_roots for inner in root.modules()}
    heads = output_heads(model) if config.target_modules == ALL_LINEAR else set()
    dead = _read_directly(model)

    targets: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for module, aliases in linears.items():
        chosen = config.target_modules == ALL_LINEAR or _any_match(config.target_modules, aliases)
        if module in saved_modules:
            reason = SAVED
        elif module in heads:
            reason = OUTPUT_HEAD
        elif not chosen:
            reason = NOT_SELECTED
        elif config.exclude_modules is not None and _any_match(config.exclude_modules, aliases):
            reason = EXCLUDED
        elif module in dead:
            reason = READ_DIRECTLY
        else:
            targets[aliases[0]] = module
            continue
        skipped[aliases[0]] = reason

    _check_names_match(config, names, linears)
    if not targets:
        raise TargetError(_nothing_selected(model, config, skipped))
    for name, module in targets.items():
        _check_adaptable(name, module)
    return Selection(targets, _saved_parameters(model, config, saved_modules), skipped)


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The linears of the output head of every transformers model inside `model` (or of `model` itself).

    Other models have no agreed way to tell their head, so theirs counts as any other linear, as in PEFT.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:  # then no model can be one of its classes
        return set()
    heads: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, transformers.PreTrainedModel):
            continue
        roots = [getattr(module, name, None) for name in HEAD_NAMES]
        try:
            roots.append(module.get_output_embeddings())
        except (AttributeError, NotImplementedError):
            pass  # a model without one
        for root in roots:
            if isinstance(root, nn.Module):
                heads.update(inner for inner in root.modules() if is_linear(inner))
    return heads


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer: by its class name, as each model library has classes of its own."""
    return any("Norm" in c.__name__ for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)


def _read_directly(model: nn.Module) -> set[nn.Module]:
    """Linears whose weight is read by the module around them, which never calls them."""
    attentions = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    return {attention.out_proj for attention in attentions}


def _any_match(patterns: str | Sequence[str], names: Sequence[str]) -> bool:
    return any(matches(patterns, name) for name in names)


def matches(patterns: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: one regular expression matches whole; of a list, a name or the ending after a dot."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _matching_roots(names: dict[nn.Module, list[str]], patterns: Sequence[str]) -> list[nn.Module]:
    """Modules named in modules_to_save; each pattern must find one."""
    for pattern in patterns:
        if not any(_any_match([pattern], aliases) for aliases in names.values()):
            offer = sorted({alias.rpartition(".")[2] for aliases in names.values() for alias in aliases} - {""})
            raise TargetError(f"modules_to_save: {pattern!r} matches no module; the last names are {_short(offer)}")
    return [module for module, aliases in names.items() if _any_match(patterns, aliases)]


def _check_names_match(
    config: OneLoRAConfig, names: dict[nn.Module, list[str]], linears: dict[nn.Module, list[str]]
) -> None:
    """Every name in a list must match: a typing error would leave a layer unadapted without a word."""
    for field in ("target_modules", "exclude_modules"):
        patterns = getattr(config, field)
        if patterns is None or isinstance(patterns, str):
            continue
        for pattern in patterns:
            if any(_any_match([pattern], aliases) for aliases in linears.values()):
                continue
            hits = [
                f"{aliases[0]!r} ({type(m).__name__})" for m, aliases in names.items() if _any_match([pattern], aliases)
            ]
            found = f"only {_short(hits)}, not a linear" if hits else "no module"
            raise TargetError(
                f"{field}: {pattern!r} matches {found}. The linears of this model: {_offer(linears.values())}"
            )


def _nothing_selected(model: nn.Module, config: OneLoRAConfig, skipped: dict[str, str]) -> str:
    if not skipped:
        return f"{type(model).__name__} holds no linear module (nn.Linear, a subclass of it, or Conv1D)"
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    listed = "; ".join(f"{reason}: {_offer([[name] for name in names])}" for reason, names in reasons.items())
    return (
        f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}, "
        f"modules_to_save={config.modules_to_save!r} select no linear of {type(model).__name__}. "
        f"Its linears, by the endings that select them: {listed}"
    )


def _check_adaptable(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise TargetError(f"{name!r} is a {type(module).__name__} without a shape yet: run the model once, then adapt")
    if "forward" in vars(module):
        # An instance's own forward hides the class's, where the update is: the vector would be dead.
        raise TargetError(
            f"{name!r} has a forward of its own on the instance (accelerate's device_map hooks do that): adapt the "
            "model first and dispatch it afterwards, or leave the module out with exclude_modules"
        )


def _saved_parameters(model: nn.Module, config: OneLoRAConfig, saved_modules: set[nn.Module]) -> list[str]:
    """Names of the parameters under modules_to_save, and of the norms' own if they are trained."""
    saved = []
    for prefix, module in model.named_modules():
        if module in saved_modules or (config.train_norms and is_norm(module)):
            own = (clean_name(f"{prefix}.{name}" if prefix else name) for name in module._parameters)
            saved += [name for name, p in zip(own, module._parameters.values(), strict=True) if p is not None]
    if config.train_norms and not any(is_norm(module) for module in model.modules()):
        raise TargetError(f"train_norms=True, but {type(model).__name__} has no normalisation layer")
    return saved


def _offer(aliases: Iterable[list[str]]) -> str:
    """The linears as the endings that select them, with how many each selects."""
    counts: dict[str, int] = {}
    for names in aliases:
        last = names[0].rpartition(".")[2]
        # 'blocks.0.mlp.2' is better offered by its parent than as '2'.
        ending = ".".join(names[0].split(".")[-2:]) if last.isdigit() else last
        counts[ending] = counts.get(ending, 0) + 1
    return _short([f"{name} (x{count})" if count > 1 else name for name, count in sorted(counts.items())]) or "none"


def _short(items: Sequence[str], most: int = 30) -> str:
    return ", ".join(items[:most]) + (f", … ({len(items) - most} more)" if len(items) > most else "")
