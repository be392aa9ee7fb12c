"""What each method puts on a model and trains; every one trains the head where the task has a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.adapting.select_targets import is_norm
from onelora_compile.examples.recipes import in_head, train_only, with_peft
from onelora_compile.examples.sentences.methods import BITFIT, FULL, HEAD_ONLY, LORA, ONE_LORA

from .task import Task

Prepare = Callable[[nn.Module, Task], nn.Module]
NORMS, ONE_LORA_NORMS, ONE_LORA_BIASES = "norms", "1LoRA + norms", "1LoRA + biases"
MISS, VERA, DORA, IA3 = "MiSS r=1", "VeRA r=1", "DoRA r=1", "IA3"


def _trained(chosen: Callable[[nn.Module, str], bool]) -> Prepare:
    def prepare(model: nn.Module, task: Task) -> nn.Module:
        head = task.head or "no head"
        return train_only(lambda name: in_head(name, head) or chosen(model, name))(model)

    return prepare


def _bitfit(model: nn.Module, task: Task) -> nn.Module:
    return _trained(lambda model, name: name.endswith("bias"))(_with_biases(model, task), task)


def _one_lora(**options: Any) -> Prepare:
    def prepare(model: nn.Module, task: Task) -> nn.Module:
        saved = [] if task.head is None else [task.head]
        return onelora.adapt(model, onelora.OneLoRAConfig(task.linears, modules_to_save=saved, **options))

    return prepare


def _one_lora_biases(model: nn.Module, task: Task) -> nn.Module:
    model = _one_lora()(_with_biases(model, task), task)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_()
    return model


def _peft(config: str, **options: Any) -> Prepare:
    def prepare(model: nn.Module, task: Task) -> nn.Module:
        saved = None if task.head is None else [task.head]
        return with_peft(config, lambda model: task.linears, modules_to_save=saved, **options)(model)

    return prepare


def _ia3(model: nn.Module, task: Task) -> nn.Module:
    """IA3 scales the inputs of second linears of an MLP and the outputs of all others, as PEFT does by default."""
    second = [name for name in task.linears if name == "down_proj"]
    return _peft("IA3Config", feedforward_modules=second)(model, task)


METHODS: dict[str, Prepare] = {
    HEAD_ONLY: _trained(lambda model, name: False),
    BITFIT: _bitfit,
    NORMS: _trained(lambda model, name: is_norm(model.get_submodule(name.rpartition(".")[0]))),
    ONE_LORA: _one_lora(),
    ONE_LORA_NORMS: _one_lora(train_norms=True),
    ONE_LORA_BIASES: _one_lora_biases,
    MISS: _peft("MissConfig", r=1),
    LORA: _peft("LoraConfig", r=1, lora_alpha=1),
    DORA: _peft("LoraConfig", r=1, lora_alpha=1, use_dora=True),
    VERA: _peft("VeraConfig", r=1),
    IA3: _ia3,
    FULL: _trained(lambda model, name: True),
}


def why_not(method: str, task: Task) -> str:
    """Why a method can't be run on a task, "" where it can."""
    if method == HEAD_ONLY and task.head is None:
        return "the task has no new head"
    if method in (MISS, VERA) and "_conv_head" in task.linears:
        return "PEFT has it for linears, not for convolutions"
    return ""


def _with_biases(model: nn.Module, task: Task) -> nn.Module:
    """A model without any bias gets biases of zero on the linears that are adapted."""
    if not any(name.endswith("bias") for name, _ in model.named_parameters()):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in task.linears:
                assert isinstance(module, nn.Linear)
                module.bias = nn.Parameter(torch.zeros(module.out_features))
    return model
