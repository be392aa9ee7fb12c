"""The methods that are compared: what each puts on the model, trains and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

import onelora_compile as onelora
from onelora_compile.examples.recipes import Prepare, save_onelora, save_peft, save_trained, train_only, with_peft

# Learning rates: the best mean accuracy over seeds 0, 1, 2 on a fifth of the training images of domain A, which
# that search did not train on, out of 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1; 300 steps each. Where an end of this
# grid was best, the next value was tried as well: 0.3 for the head and BitFit, 0.03 for full fine-tuning.


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to adapt the pretrained model.

    Attributes:
        name: shown to people.
        learning_rate: peak of the schedule.
        prepare: changes a copy of the pretrained model so that what requires a gradient is what is trained.
        save: writes what was trained, as this method's users do; (model, folder) -> the file.
        compiled: trained by `torch.compile(model, backend="onelora")`; the others are trained in eager.
    """

    name: str
    learning_rate: float
    prepare: Prepare
    save: Callable[[nn.Module, Path], Path]
    compiled: bool = False


BASE = "no adaptation"
ONE_LORA = "1LoRA"


def all_methods() -> list[Method]:
    """In the order of the tables; 1LoRA adapts the same linears as LoRA and MiSS: all of them."""
    norms = onelora.OneLoRAConfig(train_norms=True)
    return [
        Method("head only", 0.3, train_only(lambda name: name.startswith("head.")), save_trained),
        Method("BitFit", 0.1, train_only(lambda name: name.endswith(".bias")), save_trained),
        Method("LoRA r=1", 0.03, with_peft("LoraConfig", _linears, r=1, lora_alpha=1), save_peft),
        Method("MiSS r=1", 0.03, with_peft("MissConfig", _linears, r=1), save_peft),
        Method(ONE_LORA, 0.03, onelora.adapt, save_onelora, compiled=True),
        Method("1LoRA(norms)", 0.01, lambda model: onelora.adapt(model, norms), save_onelora),
        Method("full fine-tuning", 0.01, lambda model: model, save_trained),
    ]


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
