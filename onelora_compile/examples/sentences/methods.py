"""The methods that are compared: what each puts on the model, trains and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

import onelora_compile as onelora
from onelora_compile.examples.recipes import Prepare, save_onelora, save_peft, save_trained, train_only, with_peft
from onelora_compile.examples.sentences.model import HEAD

PROJECTIONS = ["query", "value"]  # what PEFT adapts of a BERT by default
HEAD_ONLY, BITFIT, ONE_LORA, LORA, FULL = "head only", "BitFit", "1LoRA", "LoRA r=1", "full fine-tuning"


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


def _with_head(chosen: Callable[[str], bool]) -> Prepare:
    return train_only(lambda name: name.startswith(HEAD) or chosen(name))


_LORA = with_peft("LoraConfig", lambda model: PROJECTIONS, r=1, lora_alpha=1, modules_to_save=[HEAD])
METHODS = {
    method.name: method
    for method in (
        Method(HEAD_ONLY, _with_head(lambda name: False), save_trained),
        Method(BITFIT, _with_head(lambda name: name.endswith("bias")), save_trained),
        Method(ONE_LORA, lambda model: onelora.adapt(model, ADAPTER), save_onelora),
        Method(LORA, _LORA, save_peft),
        Method(FULL, train_only(lambda name: True), save_trained),
    )
}


def trained_numbers(model: nn.Module) -> int:
    """How many numbers are trained, the head's among them."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
