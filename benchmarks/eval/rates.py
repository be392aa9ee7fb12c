"""Rules that give each vector a learning rate of its own, and sizes of feature sums that they go by.

Adam moves every number of a vector by about its rate in a step, whatever the size of the gradient, and the output of
the layer by rate * |feature sum|.  So one rate for all vectors is a large step where sums are large.  A rule is a
setting of the optimizer: the function of the model is 1LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import onelora_compile as onelora

from .task import Rows, Task

Groups = list[dict[str, Any]]  # of an optimizer


class Sizes(NamedTuple):
    """Root mean square of a layer's feature sums and of its outputs, and how many features it has."""

    feature_sum: float
    output: float
    in_features: int


def sizes(task: Task, model: nn.Module, rows: Rows) -> dict[str, Sizes]:
    """Sizes in one batch, by the name of the vector; the vectors are zero, as they are before training."""
    found: dict[str, Sizes] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            found[name] = Sizes(_rms(given[0].sum(axis)), _rms(output), given[0].shape[axis])

        return look

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in onelora.vectors(model)]
    try:
        with torch.no_grad():
            task.answers(model, rows)
    finally:
        for one in hooks:
            one.remove()
    return found


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _rule(factor: Callable[[Sizes], float]) -> Callable[[Task, nn.Module, float, Rows], Groups]:
    def groups(task: Task, model: nn.Module, rate: float, rows: Rows) -> Groups:
        known = sizes(task, model, rows)
        return [
            {"params": [vector], "lr": rate * factor(known[name])} for name, vector in onelora.vectors(model).items()
        ]

    return groups


RULES = {
    "by the sum": _rule(lambda layer: 1 / layer.feature_sum),
    "by the output": _rule(lambda layer: layer.output / layer.feature_sum),
    "by the features": _rule(lambda layer: layer.in_features**-0.5),
}
