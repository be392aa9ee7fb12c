"""What the examples have in common: training what is trained, writing it as a method's users do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import onelora_compile as onelora
from onelora_compile.errors import require
from onelora_compile.examples.imports import import_peft

Prepare = Callable[[nn.Module], nn.Module]


def fit(losses: Iterable[Tensor], optimizer: Any, schedule: Any, tick: Callable[[], None]) -> list[float]:
    """Take a step for each loss.

    Args:
        losses: each computed when it is asked for, after the step before.
        optimizer: of what is trained.
        schedule: of its rates.
        tick: called after each step.

    Returns:
        The loss of each step.
    """
    found = []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        found.append(loss.item())
        tick()
    return found


def one_cycle(groups: Iterable[dict[str, Any]], steps: int) -> tuple[Any, Any]:
    """AdamW without weight decay, and a one-cycle schedule up to the rate of each group and down again.

    Args:
        groups: of an optimizer; those without parameters are left out.
        steps: of the training.
    """
    given = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(given, weight_decay=0.0)
    rates = [group["lr"] for group in given]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)


def in_head(name: str, head: str) -> bool:
    """Whether the parameter is of the head, wrapped by a method or not; head is a part of the name."""
    return head in name.split(".")


def rate_groups(model: nn.Module, head: str | None, rate: float, head_rate: float) -> list[dict[str, Any]]:
    """Groups of an optimizer: what is trained, and then the new head, which has a rate of its own."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    new = {name for name, _ in trained if head is not None and in_head(name, head)}
    return [
        {"params": [parameter for name, parameter in trained if (name in new) is own], "lr": lr}
        for own, lr in ((False, rate), (True, head_rate))
    ]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def train_only(chosen: Callable[[str], bool]) -> Prepare:
    """Train the parameters that are chosen by their names."""

    def prepare(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen(name))
        return model

    return prepare


def with_peft(config: str, linears: Callable[[nn.Module], Sequence[str]], **options: object) -> Prepare:
    """Adapt linears by a method of PEFT.

    Args:
        config: the class of its configuration.
        linears: their names in a model.
        options: of the configuration.
    """

    def prepare(model: nn.Module) -> nn.Module:
        peft = import_peft()
        chosen = getattr(peft, config)(target_modules=linears(model), **options)
        adapted: nn.Module = peft.get_peft_model(model, chosen)
        return adapted

    return prepare


def save_trained(model: nn.Module, folder: Path) -> Path:
    """Write what requires a gradient."""
    safetensors = require("safetensors.torch", "demo", "write the trained tensors")
    file = folder / "trained.safetensors"
    safetensors.save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, file)
    return file


def save_peft(model: nn.Module, folder: Path) -> Path:
    """Write as PEFT does."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder / "adapter_model.safetensors"


def save_onelora(model: nn.Module, folder: Path) -> Path:
    """Write an adapter file."""
    file = folder / "adapter.safetensors"
    onelora.save_adapter(model, file)
    return file
