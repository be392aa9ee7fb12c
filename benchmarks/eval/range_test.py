"""What a range test tells of the learning rate: one training whose rate grows from step to step.

A finder of rates as in fastai and Lightning (after L. Smith, arXiv 1506.01186): the loss over the rate, smoothed, and
of that the rate where it falls fastest, or a tenth of the rate where it is lowest.  It sees no validation data.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from onelora_compile.examples.recipes import rate_groups
from onelora_compile.examples.sentences.methods import ONE_LORA
from onelora_compile.progress import Count

from . import stages, store
from .methods import METHODS
from .task import Task

LOW, HIGH, STEPS, SEEDS = 1e-5, 1.0, 60, (0, 1, 2)
_KEPT = 0.85  # of the smoothed loss from one step to the next
_DIVERGED = 4  # times the lowest smoothed loss ends a test


def measure(folder: Path, task: Task, bar: Count) -> None:
    """Run the range test of 1LoRA with each seed that has no result yet."""
    for seed in SEEDS:
        path = _place(folder, task, seed)
        if not path.exists():
            bar.start(f"{task.name}, range test, seed {seed}", STEPS)
            rates, losses = _run(task, seed, bar.step)
            store.write(path, {"task": task.name, "seed": seed, "rates": rates, "losses": losses})


def suggestions(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The rate at which the smoothed loss falls fastest, and a tenth of the one at which it is lowest."""
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else _KEPT * smooth[-1] + (1 - _KEPT) * loss)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    falls = [after - before for before, after in itertools.pairwise(smooth[: lowest + 1])]
    fastest = min(range(len(falls)), key=falls.__getitem__) if falls else 0
    return rates[fastest], rates[lowest] / 10


def table(folder: Path, tasks: Sequence[Task]) -> str:
    """What the tests propose beside the best rate of the grid, as Markdown; "" where none was run."""
    from .tables import markdown  # which imports this file

    rows = []
    for task in tasks:
        known = [
            json.loads(path.read_text(encoding="utf-8"))
            for seed in SEEDS
            if (path := _place(folder, task, seed)).exists()
        ]
        runs = store.read(folder, task.name, "validation", ONE_LORA)
        if known and runs:
            found = [suggestions(one["rates"], one["losses"]) for one in known]
            fastest, tenth = ([each[column] for each in found] for column in (0, 1))
            rows.append([task.name, f"{stages.best(runs, task.chosen_by)['rate']:g}", _range(fastest), _range(tenth)])
    return (
        markdown(["", "best of the grid", "where the loss falls fastest", "a tenth of the lowest"], rows)
        if rows
        else ""
    )


def _run(task: Task, seed: int, tick: Callable[[], None]) -> tuple[list[float], list[float]]:
    model = METHODS[ONE_LORA](task.model(seed), task)
    vectors, head = rate_groups(model, task.head, LOW, task.head_rate)
    optimizer = torch.optim.AdamW([vectors, head], weight_decay=0.0)
    rates: list[float] = []
    losses: list[float] = []
    for step, rows in enumerate(task.batches(STEPS, seed)):
        optimizer.param_groups[0]["lr"] = LOW * (HIGH / LOW) ** (step / (STEPS - 1))
        optimizer.zero_grad()
        loss = task.loss(model, rows)
        if not math.isfinite(loss.item()) or (losses and loss.item() > _DIVERGED * min(losses)):
            break
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        tick()
    return rates, losses


def _place(folder: Path, task: Task, seed: int) -> Path:
    return folder / task.name / "range" / f"1lora_{seed}.json"


def _range(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1g} ({min(rates):.1g} to {max(rates):.1g})"
