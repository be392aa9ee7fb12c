"""The text tasks of the demo: what people feel in sentences about films, about products and in a newspaper."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor, nn

from onelora_compile.examples.sentences import train
from onelora_compile.examples.sentences.data import load_tasks
from onelora_compile.examples.sentences.methods import PROJECTIONS
from onelora_compile.examples.sentences.model import HEAD, SentenceClassifier, Tokens

from .task import Part, Rows, Task


class Sentences(Task):
    """Two classes of sentences; MiniLM."""

    base = "MiniLM-L6 (22.6 M, LayerNorm), query and value"
    linears = PROJECTIONS
    head = HEAD
    head_rate = train.HEAD_RATE
    batch = 16

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps

    def load(self) -> nn.Module:
        return SentenceClassifier()

    def part(self, part: Part) -> Rows:
        return self._parts[part]

    def batches(self, steps: int, seed: int) -> Iterator[Rows]:
        return train.batches(self._parts["train"], steps, seed, self.batch)

    def answers(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        tokens, mask, labels = train.trimmed(rows)
        return model(tokens, mask), labels

    @functools.cached_property
    def _parts(self) -> dict[Part, train.Encoded]:
        task = next(task for task in load_tasks() if task.name == self.name)
        tokens = Tokens()
        return {
            "train": tokens(task.train),
            "validation": short_first(tokens(task.validation)),
            "test": short_first(tokens(task.test)),
        }


def short_first(data: train.Encoded) -> train.Encoded:
    """In the order of their lengths, so that little is padding."""
    tokens, mask, labels = data
    order = mask.sum(1).argsort(stable=True)
    return tokens[order], mask[order], labels[order]
