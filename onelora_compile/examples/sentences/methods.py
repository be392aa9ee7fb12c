"""The methods that are compared: what each puts on the model, trains and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

import onelora_compile as onelora
from onelora_compile.examples.recipes import Prepare, save_onelora, save_peft, save_trained, train_only, with_peft

HEAD = "head"
PROJECTIONS = ["query", "value"]  # what PEFT adapts of a BERT by default
HEAD_ONLY, BITFIT, NORMS, ONE_LORA, ONE_LORA_NORMS, ONE_LORA_ALL, LORA, MISS, FULL = (
    *("head only", "BitFit", "norms", "1LoRA", "1LoRA + norms", "1LoRA, all linears"),
    *("LoRA r=1", "MiSS r=1", "full fine-tuning"),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to adapt the pretrained model; every one trains the head.

    Attributes:
        name: shown to people.
        prepare: changes a copy of the pretrained model so that what requires a gradient is what is trained.
        save: writes what was trained, as this method's users do; (model, folder) -> the file.
    """

    name: str
    prepare: Prepare
    save: Callable[[nn.Module, Path], Path]


ADAPTER = onelora.OneLoRAConfig(target_modules=PROJECTIONS, modules_to_save=[HEAD])
_NORMS = onelora.OneLoRAConfig(target_modules=PROJECTIONS, modules_to_save=[HEAD], train_norms=True)
_ALL = onelora.OneLoRAConfig(modules_to_save=[HEAD])


def _with_head(chosen: Callable[[str], bool]) -> Prepare:
    return train_only(lambda name: name.startswith(HEAD) or chosen(name))


def _by_peft(config: str, **options: object) -> Prepare:
    return with_peft(config, lambda model: PROJECTIONS, modules_to_save=[HEAD], **options)


METHODS = {
    method.name: method
    for method in (
        Method(HEAD_ONLY, _with_head(lambda name: False), save_trained),
        Method(BITFIT, _with_head(lambda name: name.endswith("bias")), save_trained),
        Method(NORMS, _with_head(lambda name: "LayerNorm" in name), save_trained),
        Method(ONE_LORA, lambda model: onelora.adapt(model, ADAPTER), save_onelora),
        Method(ONE_LORA_NORMS, lambda model: onelora.adapt(model, _NORMS), save_onelora),
        Method(ONE_LORA_ALL, lambda model: onelora.adapt(model, _ALL), save_onelora),
        Method(LORA, _by_peft("LoraConfig", lora_alpha=1), save_peft),
        Method(MISS, _by_peft("MissConfig"), save_peft),
        Method(FULL, train_only(lambda name: True), save_trained),
    )
}


def trained_numbers(model: nn.Module) -> int:
    """How many numbers are trained, the head's among them."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
