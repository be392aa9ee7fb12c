"""One run: train a method on a task, answer the validation data, and the test data only where that is asked for."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from onelora_compile.examples.measure import machine, peak_bytes, training_step
from onelora_compile.examples.recipes import fit, one_cycle, rate_groups
from onelora_compile.examples.sentences.methods import trained_numbers
from onelora_compile.testing import saved_bytes

from .methods import METHODS
from .rates import RULES
from .task import Task

VERSIONS = ("peft", "transformers", "safetensors")


def run(
    task: Task,
    method: str,
    rate: float,
    seed: int,
    *,
    test: bool,
    rule: str = "",
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train once.

    Args:
        task: what is learned.
        method: a name of `METHODS`.
        rate: peak learning rate of all but the head.
        seed: of what a method starts from, of the head and of the order of the data.
        test: answer the test data too, and measure memory.
        rule: a name of `RULES`, by which each vector has a rate of its own; "" for one rate.
        tick: called after each step.
    """
    model = METHODS[method](task.model(seed), task)
    optimizer, schedule = one_cycle(_groups(task, model, rate, rule, seed), task.steps)
    clock, start = [time.process_time()], time.perf_counter()

    def stepped() -> None:
        clock.append(time.process_time())
        tick()

    losses = fit((task.loss(model, rows) for rows in task.batches(task.steps, seed)), optimizer, schedule, stepped)
    seconds = time.perf_counter() - start
    chosen = task.evaluate(model, "validation")
    result: dict[str, Any] = {
        "task": task.name,
        "method": method,
        "rule": rule,
        "rate": rate,
        "seed": seed,
        "settings": task.settings(),
        "numbers": trained_numbers(model),
        "train_loss": _finite(statistics.fmean(losses[-max(1, len(losses) // 4) :])),
        "validation": {"accuracy": chosen.accuracy, "loss": _finite(chosen.loss)},
        "step_cpu_ms": statistics.median(b - a for a, b in itertools.pairwise(clock)) * 1e3,
        "seconds": seconds,
    }
    if test:
        found = task.evaluate(model, "test")
        result |= {"test": {"accuracy": found.accuracy, "loss": _finite(found.loss)}} | _memory(task, model)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return result | {"machine": machine() | versions, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _groups(task: Task, model: nn.Module, rate: float, rule: str, seed: int) -> list[dict[str, Any]]:
    rest, head = rate_groups(model, task.head, rate, task.head_rate)
    return [*(RULES[rule](task, model, rate, next(task.batches(1, seed))) if rule else [rest]), head]


def _memory(task: Task, model: nn.Module) -> dict[str, int]:
    """Bytes that autograd keeps for backward of a batch, and the peak of a step over what was allocated before."""
    rows = next(task.batches(1, seed=0))
    step = training_step(model, lambda: task.loss(model, rows))
    step()
    return {"kept_bytes": saved_bytes(lambda: task.loss(model, rows)), "peak_bytes": peak_bytes(step)}


def _finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None
