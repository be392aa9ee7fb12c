"""Choose the rate of each method on the validation data, then test it there, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onelora_compile.errors import OneLoRAError
from onelora_compile.progress import Count

from . import store
from .task import Task
from .training import run

CHOOSING_SEED = 0  # no run that a rate was chosen by is tested


def choose(folder: Path, task: Task, method: str, rates: Sequence[float], bar: Count, rule: str = "") -> None:
    """Train at each rate of the grid that has no result yet; the test data is left alone."""
    named = store.label({"method": method, "rule": rule})
    for rate in rates:
        path = store.place(folder, task.name, "validation", named, f"{rate:g}")
        if not path.exists():
            _train(path, f"{task.name}, {named}, rate {rate:g}", task, method, rate, CHOOSING_SEED, bar, rule)
    _check(folder, task, store.read(folder, task.name, "validation", named))


def answer_test(folder: Path, task: Task, method: str, seeds: Sequence[int], bar: Count, rule: str = "") -> None:
    """Train with each seed that has no result yet at the chosen rate, and answer the test data.

    Raises:
        OneLoRAError: no rate was chosen; or another one than that of tests that there are.
    """
    named = store.label({"method": method, "rule": rule})
    runs = store.read(folder, task.name, "validation", named)
    if not runs:
        raise OneLoRAError(f"no rate of {named} was tried on {task.name}, so there is none to test")
    rate = best(runs, task.chosen_by)["rate"]
    done = store.read(folder, task.name, "test", named)
    _check(folder, task, done)
    if other := {one["rate"] for one in done} - {rate}:
        raise OneLoRAError(
            f"{named} was tested on {task.name} at the rate {other.pop():g}, and {rate:g} is the best now: the "
            f"test is for one rate. To begin anew remove its files in {folder / task.name / 'test'}"
        )
    for seed in seeds:
        if seed == CHOOSING_SEED:
            raise OneLoRAError(f"seed {seed} is the one that rates are chosen with; test with others")
        path = store.place(folder, task.name, "test", named, str(seed))
        if not path.exists():
            _train(path, f"{task.name}, {named}, seed {seed}", task, method, rate, seed, bar, rule, test=True)


def at_one_rate(
    folder: Path, task: Task, method: str, rate: float, seeds: Sequence[int], bar: Count, rule: str = ""
) -> None:
    """Train with each seed that has no result yet at a rate that nobody chose for the task; the test is left alone."""
    named = store.label({"method": method, "rule": rule})
    for seed in seeds:
        path = store.place(folder, task.name, "fixed", named, f"{rate:g}_{seed}")
        if not path.exists():
            _train(path, f"{task.name}, {named}, rate {rate:g}, seed {seed}", task, method, rate, seed, bar, rule)
    _check(folder, task, store.read(folder, task.name, "fixed", named))


def _train(
    path: Path,
    what: str,
    task: Task,
    method: str,
    rate: float,
    seed: int,
    bar: Count,
    rule: str,
    test: bool = False,
) -> None:
    """Train once, write the result and tell it."""
    bar.start(what, task.steps)
    result = run(task, method, rate, seed, test=test, rule=rule, tick=bar.step)
    store.write(path, result)
    scores = f"test {told(result['test'])}" if test else told(result["validation"])
    print(f"{what}: {scores}, {result['seconds']:.0f} s")


def best(runs: Sequence[dict[str, Any]], chosen_by: str) -> dict[str, Any]:
    """The run whose rate is chosen."""

    def cost(run: dict[str, Any]) -> tuple[float, float]:
        scores = run["validation"]
        loss = math.inf if scores["loss"] is None else scores["loss"]  # it diverged
        return (loss, 0.0) if chosen_by == "loss" else (-scores["accuracy"], loss)

    return min(runs, key=cost)


def told(scores: dict[str, Any]) -> str:
    """Scores in words."""
    loss = "diverged" if scores["loss"] is None else f"loss {scores['loss']:.3f}"
    return f"{scores['accuracy']:.1%}, {loss}"


def _check(folder: Path, task: Task, runs: Sequence[dict[str, Any]]) -> None:
    for one in runs:
        if one["settings"] != task.settings():
            raise OneLoRAError(
                f"results of {store.label(one)} in {folder / task.name} were made with {one['settings']}, and the task "
                f"has {task.settings()} now: remove them, or name another folder by --folder"
            )
