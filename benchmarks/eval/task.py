"""What a task is: a pretrained model, three parts of data, and a question of classes."""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[Tensor, ...]
Part = Literal["train", "validation", "test"]


class Scores(NamedTuple):
    """Share of right answers, and the mean cross entropy of an answer."""

    accuracy: float
    loss: float


class Task(abc.ABC):
    """One task; every method gets the same model, linears, head, steps and order of the data.

    Attributes:
        name: a word.
        base: what is adapted, shown to people.
        linears: the ends of the names of what is adapted.
        head: the name of the new head, a module that every method trains; None where there is none.
        head_rate: its learning rate, the same for every method.
        chosen_by: what on the validation data a rate is chosen by; loss also decides between equal accuracies.
        steps, batch: of a training.
        most: rows of a part that are answered; None for all.
        chunk: rows that are answered at once.
    """

    name: str
    base: ClassVar[str]
    linears: ClassVar[list[str]]
    head: ClassVar[str | None] = None
    head_rate: ClassVar[float] = 0.0
    chosen_by: Literal["accuracy", "loss"] = "accuracy"
    steps: int
    batch: ClassVar[int]
    most: int | None = None
    chunk: ClassVar[int] = 50

    @abc.abstractmethod
    def load(self) -> nn.Module:
        """The pretrained model in evaluation mode, as it is before a head is made for it."""

    @abc.abstractmethod
    def part(self, part: Part) -> Rows:
        """Tensors with a row for each example."""

    @abc.abstractmethod
    def batches(self, steps: int, seed: int) -> Iterator[Rows]:
        """Batches of the training part."""

    @abc.abstractmethod
    def answers(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        """Logits [answers, classes] of rows and the right classes [answers]."""

    def model(self, seed: int) -> nn.Module:
        """A copy of the pretrained model with a new head; the random state is that of the seed and the head."""
        model = copy.deepcopy(self._loaded)
        torch.manual_seed(seed)  # after loading, which draws numbers, and is done once in a process
        if self.head is not None:
            model.get_submodule(self.head).reset_parameters()  # type: ignore[operator]
        return model

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """Mean cross entropy of the answers."""
        return F.cross_entropy(*self.answers(model, rows))

    def evaluate(self, model: nn.Module, part: Part) -> Scores:
        """Answer a part."""
        right, loss, count = 0, 0.0, 0
        with torch.no_grad():
            for rows in zip(*(one[: self.most].split(self.chunk) for one in self.part(part)), strict=True):
                logits, labels = self.answers(model, rows)
                right += int((logits.argmax(-1) == labels).sum())
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                count += len(labels)
        return Scores(right / count, loss / count)

    def settings(self) -> dict[str, Any]:
        """What a result hangs on besides method, rate and seed: one with other settings is no result of this task."""
        parts: tuple[Part, ...] = ("train", "validation", "test")
        sizes = {part: len(self.part(part)[0]) for part in parts} | {"answered": self.most}
        return {"steps": self.steps, "batch": self.batch, "head_rate": self.head_rate, "linears": self.linears, **sizes}

    @functools.cached_property
    def _loaded(self) -> nn.Module:
        return self.load().eval()
