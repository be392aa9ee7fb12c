"""What PEFT needs to know of a model, and the numbers of an adapter do not tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from onelora_compile.adapting.module_names import clean_name, matches, named_modules
from onelora_compile.adapting.peft_parts import is_tuner_layer
from onelora_compile.adapting.weight_target import Target
from onelora_compile.kinds import CONVOLUTIONS, is_conv1d
from onelora_compile.sharded import whole
from onelora_compile.weights.adapter_content import CONV1D, CONVOLUTION, LINEAR, AdapterFile, Layer
from onelora_compile.weights.fingerprint import fingerprint_of_values

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of a batch norm
# How transformers ends the names of its classes, and PEFT's words for what they do.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def layers_of(root: nn.Module, targets: Mapping[str, Target]) -> dict[str, Layer]:
    """What each vector is on, by its name."""
    # A module that is registered twice is replaced in one place by PEFT, unless one parent holds it for both names.
    places: dict[nn.Module, set[tuple[int, str]]] = {}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, set()).add((id(parent), name))
    wrapped = [name for name, module in named_modules(root) if is_tuner_layer(module)]
    found: dict[str, Layer] = {}
    for name, target in targets.items():
        inside = any(not one or name.startswith(f"{one}.") for one in wrapped)
        kind = "wrapped" if inside else _kind(target, len(places.get(target.module, ())))
        found[name] = Layer(kind, _inputs(target))
    return found


def _kind(target: Target, places: int) -> str:
    module = target.module
    if len(target.shape) > 1:
        return "experts"
    if places != 1:
        return "root" if places == 0 else "shared"
    if isinstance(module, CONVOLUTIONS) and target.parameter == "weight":
        return CONVOLUTION
    if not target.called:
        return "read"
    if is_conv1d(module):
        return CONV1D
    return LINEAR if isinstance(module, nn.Linear) else "class"


def _inputs(target: Target) -> tuple[int, ...]:
    weight = target.weight
    if weight is None or not target.dims:
        return (target.in_features,)
    return tuple(weight.shape[dim] for dim in target.dims)


def base_model_of(root: nn.Module) -> str:
    """The name or path that transformers or diffusers loaded the model from; "" where it has none."""
    for holder in (getattr(root, "config", None), root):
        name = getattr(holder, "_name_or_path", None) or getattr(holder, "name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return ""


def task_type_of(root: nn.Module) -> str:
    """PEFT's word for what a model of transformers does; "" for any other."""
    names = [one.__name__ for one in type(root).__mro__]  # adapting may have given it a class of its own
    text = getattr(root, "main_input_name", "") == "input_ids"
    return next((task for end, task in _TASKS.items() if text and any(one.endswith(end) for one in names)), "")


def whole_modules(root: nn.Module, file: AdapterFile) -> dict[str, Tensor]:
    """What of an adapter was trained besides its vectors, as PEFT holds it: modules with all that they hold."""
    roots = trained_modules(dataclasses.replace(file, saved=without_still_statistics(file)))
    tensors: dict[str, Tensor] = {}
    for name, module in named_modules(root):
        if name in roots:
            own = {clean_name(f"{name}.{key}"): value for key, value in module.state_dict().items()}
            tensors |= {key: whole(value.detach()).to("cpu", copy=True) for key, value in own.items()}
    # The model's values are those of its active adapter.
    return tensors | {key: value for key, value in file.saved.items() if key in tensors}


def trained_modules(file: AdapterFile) -> list[str]:
    """The modules that were trained as a whole: those of modules_to_save, else the owner of each tensor."""
    roots: dict[str, None] = {}
    for name in file.saved:
        names = name.split(".")[:-1]
        modules = [".".join(names[:count]) for count in range(1, len(names) + 1)]
        named = (one for one in modules if matches(file.config.modules_to_save, one))
        roots[next(named, ".".join(names))] = None
    return list(roots)


def without_still_statistics(file: AdapterFile) -> dict[str, Tensor]:
    """What an adapter trained besides its vectors, less the statistics of batch norms that are the base's still."""
    owned: dict[str, list[str]] = {}
    for name in file.saved:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    still = {name for names in owned.values() if _are_still(file, names) for name in names}
    return {name: value for name, value in file.saved.items() if name not in still}


def _are_still(file: AdapterFile, names: list[str]) -> bool:
    if not all(name.endswith(STATISTICS) for name in names):
        return False
    known = [name for name in names if file.saved[name].is_floating_point()]
    return all(
        name in file.bases and fingerprint_of_values(file.saved[name]).distance(file.bases[name]) == 0 for name in known
    )
