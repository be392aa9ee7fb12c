"""Training and evaluation, the same for every method."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelora_compile.examples.digits.data import Domain, augmented, batches
from onelora_compile.examples.digits.model import DigitViT
from onelora_compile.examples.recipes import fit

BATCH = 32
COPIES = 3  # changed versions of each image to pretrain on


def pretrain(domain: Domain, steps: int, seed: int, tick: Callable[[], None] = lambda: None) -> DigitViT:
    """The base: a new model, trained on the original digits and mild changes of them."""
    torch.manual_seed(seed)
    model = DigitViT()
    images = augmented(domain.train_images, COPIES, seed)
    labels = domain.train_labels.repeat(COPIES + 1)
    train(model, images, labels, 2e-3, steps, seed, tick, weight_decay=0.05)
    return model


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    learning_rate: float,
    steps: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    weight_decay: float = 0.0,
) -> list[float]:
    """Train what requires a gradient, with AdamW and a one-cycle schedule.

    The model has no dropout, so that it is the same in training and evaluation mode and never leaves the former.

    Args:
        model: plain or compiled.
        images: of the training part.
        labels: of the training part.
        learning_rate: peak of the schedule.
        steps: of batches of `BATCH`.
        seed: of the order of the batches.
        tick: called after each step.
        weight_decay: of AdamW.

    Returns:
        The loss of each step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = (
        F.cross_entropy(model(images[batch]), labels[batch]) for batch in batches(len(images), BATCH, steps, seed)
    )
    return fit(losses, optimizer, schedule, tick)


def predict(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits [*, 10], computed in batches of `BATCH`; the last one is filled up, so that there is one shape."""
    with torch.no_grad():
        parts = [model(torch.cat([part, part.new_zeros(BATCH - len(part), 8, 8)])) for part in images.split(BATCH)]
    return torch.cat(parts)[: len(images)]
