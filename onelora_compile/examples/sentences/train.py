"""Training and evaluation, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelora_compile.examples.recipes import fit, one_cycle, rate_groups
from onelora_compile.examples.sentences.model import HEAD

BATCH, STEPS = 16, 80
HEAD_RATE = 1e-2  # peak
Encoded = tuple[Tensor, Tensor, Tensor]  # token ids, mask, labels


def train(
    model: nn.Module,
    data: Encoded,
    learning_rate: float,
    steps: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train what requires a gradient, with AdamW and a one-cycle schedule; the model stays in evaluation mode.

    The head is new and has a rate of its own, the same for every method.

    Args:
        model: plain or compiled.
        data: the training part.
        learning_rate: peak of the schedule, of all but the head.
        steps: of batches of `BATCH`.
        seed: of the order of the batches.
        tick: called after each step.

    Returns:
        The loss of each step.
    """
    optimizer, schedule = one_cycle(rate_groups(model, HEAD, learning_rate, HEAD_RATE), steps)
    losses = (F.cross_entropy(model(tokens, mask), labels) for tokens, mask, labels in batches(data, steps, seed))
    return fit(losses, optimizer, schedule, tick)


def batches(data: Encoded, steps: int, seed: int, size: int = BATCH) -> Iterator[Encoded]:
    """Random batches, each sentence once before any comes again; sentences of one batch are about equally long.

    What is padding in all rows is left out, which halves the work.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = data[1].sum(1)
    left: list[Tensor] = []
    for _ in range(steps):
        if not left:
            order = torch.randperm(len(lengths), generator=generator)
            for pool in order.split(8 * size):
                left += pool[lengths[pool].argsort()].split(size)
            left = [left[i] for i in torch.randperm(len(left), generator=generator) if len(left[i]) == size]
        rows = left.pop()
        yield trimmed(tuple(one[rows] for one in data))


def trimmed(data: Any) -> Encoded:
    """Without the columns that are padding in all rows."""
    tokens, mask, labels = data
    longest = int(mask.sum(1).max())
    return tokens[:, :longest], mask[:, :longest], labels


def predict(model: Callable[[Tensor, Tensor], Tensor], data: Encoded, rows: int = 50) -> Tensor:
    """Logits [sentences, 2], the short sentences first so that little is padding; returned in the order of the data."""
    order = data[1].sum(1).argsort()
    logits = torch.empty(len(order), 2)
    with torch.no_grad():
        for part in order.split(rows):
            tokens, mask, _ = trimmed(tuple(one[part] for one in data))
            logits[part] = model(tokens, mask)
    return logits
