"""Which modules are adapted: PEFT's selection rules, with an answer for every module that is left out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from torch import nn

from onelora_compile.adapting.adapted_module import is_vector
from onelora_compile.adapting.candidates import NOT_LINEAR, Candidate, candidates_of
from onelora_compile.adapting.check_selection import check_adaptable, check_names_match, nothing_selected
from onelora_compile.adapting.config import OneLoRAConfig, check_config
from onelora_compile.adapting.dispatched import offloaded_from_above
from onelora_compile.adapting.module_names import any_match, clean_name, named_modules, names_of
from onelora_compile.adapting.peft_parts import PEFT_PART, peft_parts
from onelora_compile.adapting.weight_target import Target, reading, vector_key
from onelora_compile.errors import TargetError
from onelora_compile.kinds import is_linear, is_plain
from onelora_compile.printable import shortened

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


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a configuration means for one model.

    Attributes:
        targets: weights to adapt, by the name of their vector.
        saved: qualified names of the parameters that are trained as they are.
        skipped: every other weight of a linear op, with the reason.
        not_linear: convolutions and embeddings, which the method does not adapt, with what they are.
        uses: how often one forward uses a weight, at least and at most: by the name of its vector, where that may be
            more than once, and of trained linears by the name of the weight.
    """

    targets: dict[str, Target]
    saved: list[str]
    skipped: dict[str, str]
    not_linear: dict[str, str] = dataclasses.field(default_factory=dict)
    uses: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


def select(model: nn.Module, config: OneLoRAConfig) -> Selection:
    """Apply the rules of `config` to the linear ops of `model`.

    Raises:
        ConfigError: `config` is something else.
        TargetError: nothing is selected, a name in a list matches nothing, or a selected module can't be adapted.
    """
    check_config(config)
    names = names_of(model)
    candidates = candidates_of(names, model)
    asked = _asked_for(config, names)
    candidates |= asked

    saved_modules = _saved_modules(names, config)
    heads = output_heads(model) if config.target_modules == ALL_LINEAR else set()
    theirs = peft_parts(model) if config.target_modules == ALL_LINEAR else set()

    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    not_linear: dict[str, str] = {}
    for key, candidate in candidates.items():
        module = candidate.module
        named = key in asked or (
            config.target_modules != ALL_LINEAR and any_match(config.target_modules, candidate.names)
        )
        if module in saved_modules:
            reason = SAVED
        elif module in heads:
            reason = OUTPUT_HEAD
        elif module in theirs:
            reason = PEFT_PART
        elif candidate.reason in NOT_LINEAR and not (named and candidate.target):
            not_linear[key] = candidate.reason
            continue
        elif config.target_modules != ALL_LINEAR and not named:
            reason = NOT_SELECTED
        elif config.exclude_modules is not None and any_match(config.exclude_modules, candidate.names):
            reason = EXCLUDED
        elif candidate.target is None or (candidate.reason and not named):
            reason = candidate.reason
        else:
            targets[key] = candidate.target
            continue
        skipped[key] = reason

    check_names_match(config, names, candidates)
    if not targets:
        raise TargetError(nothing_selected(model, config, skipped, not_linear))
    from_above = offloaded_from_above(model)
    for key, target in targets.items():
        check_adaptable(key, target, from_above)
    uses = {key: candidates[key].uses for key in targets if candidates[key].uses not in ((0, 0), (1, 1))}
    trained = ((one.module, one.target, one.uses) for one in candidates.values() if one.module in saved_modules)
    uses |= {f"{names[module][0]}.{target.parameter}": often for module, target, often in trained if target is not None}
    return Selection(targets, _saved_parameters(model, config, saved_modules), skipped, not_linear, uses)


def available_targets(model: nn.Module, config: OneLoRAConfig) -> list[str]:
    """The names of all vectors that the model could get, by any choice of target_modules."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model):
        names.setdefault(module, []).append(name)
    candidates = candidates_of(names, model) | _asked_for(config, names)
    return [key for key, candidate in candidates.items() if candidate.target is not None]


def _asked_for(config: OneLoRAConfig, names: dict[nn.Module, list[str]]) -> dict[str, Candidate]:
    """The weights of target_parameters; each name must find one."""
    result: dict[str, Candidate] = {}
    for pattern, axis in config.target_parameters.items():
        found = False
        for module, aliases in names.items():
            for parameter, value in module._parameters.items():
                own = [f"{alias}.{parameter}".removeprefix(".") for alias in aliases]
                if value is None or not any_match([pattern], own):
                    continue
                if value.ndim < 2 or not -value.ndim <= axis < value.ndim or not is_plain(value):
                    raise TargetError(
                        f"target_parameters: {own[0]!r} is {list(value.shape)} in {value.dtype}: it has no input axis "
                        f"{axis}, or is not the weight of a linear op"
                    )
                target = reading(module, parameter, (axis % value.ndim,))
                result[vector_key(aliases[0], parameter)] = Candidate(module, own, target)
                found = True
        if not found:
            raise TargetError(f"target_parameters: {pattern!r} matches no parameter of the model")
    return result


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


def saved_parameters(model: nn.Module, config: OneLoRAConfig) -> list[str]:
    """The parameters that a configuration trains as they are.

    Raises:
        TargetError: a name in modules_to_save matches nothing, or there is no norm to train.
    """
    return _saved_parameters(model, config, _saved_modules(names_of(model), config))


def _saved_modules(names: dict[nn.Module, list[str]], config: OneLoRAConfig) -> set[nn.Module]:
    return {inner for root in _matching_roots(names, config.modules_to_save) for inner in root.modules()}


def _matching_roots(names: dict[nn.Module, list[str]], patterns: Sequence[str]) -> list[nn.Module]:
    """Modules named in modules_to_save; each pattern must find one."""
    for pattern in patterns:
        if not any(any_match([pattern], aliases) for aliases in names.values()):
            offer = sorted({alias.rpartition(".")[2] for aliases in names.values() for alias in aliases} - {""})
            raise TargetError(
                f"modules_to_save: {pattern!r} matches no module; the last names are {shortened(offer, 30)}"
            )
    return [module for module, aliases in names.items() if any_match(patterns, aliases)]


def _saved_parameters(model: nn.Module, config: OneLoRAConfig, saved_modules: set[nn.Module]) -> list[str]:
    """Names of the parameters under modules_to_save, and of the norms' own if they are trained."""
    saved = []
    for prefix, module in model.named_modules():
        if module in saved_modules or (config.train_norms and is_norm(module)):
            own = (name for name, p in module._parameters.items() if p is not None and not is_vector(name))
            saved += [clean_name(f"{prefix}.{name}" if prefix else name) for name in own]
    if config.train_norms and not any(is_norm(module) for module in model.modules()):
        raise TargetError(f"train_norms=True, but {type(model).__name__} has no normalisation layer")
    return saved
