"""The methods that are compared: what each puts on the model, trains and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import require
from onelora_compile.examples.imports import import_peft

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
    prepare: Callable[[nn.Module], nn.Module]
    save: Callable[[nn.Module, Path], Path]


ADAPTER = onelora.OneLoRAConfig(target_modules=PROJECTIONS, modules_to_save=[HEAD])
_NORMS = onelora.OneLoRAConfig(target_modules=PROJECTIONS, modules_to_save=[HEAD], train_norms=True)
_ALL = onelora.OneLoRAConfig(modules_to_save=[HEAD])

METHODS = {
    method.name: method
    for method in (
        Method(HEAD_ONLY, lambda model: _train_only(model, lambda name: False), lambda m, f: _save_trained(m, f)),
        Method(
            BITFIT, lambda model: _train_only(model, lambda n: n.endswith("bias")), lambda m, f: _save_trained(m, f)
        ),
        Method(NORMS, lambda model: _train_only(model, lambda n: "LayerNorm" in n), lambda m, f: _save_trained(m, f)),
        Method(ONE_LORA, lambda model: onelora.adapt(model, ADAPTER), lambda m, f: _save_onelora(m, f)),
        Method(ONE_LORA_NORMS, lambda model: onelora.adapt(model, _NORMS), lambda m, f: _save_onelora(m, f)),
        Method(ONE_LORA_ALL, lambda model: onelora.adapt(model, _ALL), lambda m, f: _save_onelora(m, f)),
        Method(LORA, lambda model: _peft(model, "LoraConfig", lora_alpha=1), lambda m, f: _save_peft(m, f)),
        Method(MISS, lambda model: _peft(model, "MissConfig"), lambda m, f: _save_peft(m, f)),
        Method(FULL, lambda model: _train_only(model, lambda name: True), lambda m, f: _save_trained(m, f)),
    )
}


def trained_numbers(model: nn.Module) -> int:
    """How many numbers are trained, the head's among them."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _train_only(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD) or chosen(name))
    return model


def _peft(model: nn.Module, config: str, **options: object) -> nn.Module:
    peft = import_peft()
    chosen = getattr(peft, config)(r=1, target_modules=PROJECTIONS, modules_to_save=[HEAD], **options)
    adapted: nn.Module = peft.get_peft_model(model, chosen)
    return adapted


def _save_trained(model: nn.Module, folder: Path) -> Path:
    safetensors = require("safetensors.torch", "demo", "write the trained tensors")
    file = folder / "trained.safetensors"
    safetensors.save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, file)
    return file


def _save_peft(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder / "adapter_model.safetensors"


def _save_onelora(model: nn.Module, folder: Path) -> Path:
    file = folder / "adapter.safetensors"
    onelora.save_adapter(model, file)
    return file
