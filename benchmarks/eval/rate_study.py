"""Does one learning rate do for all tasks? What each rate and rule loses against the best of each task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onelora_compile.examples.sentences.methods import ONE_LORA

from . import stages, store
from .rates import RULES
from .task import Task

RULE, RATE = "by the output", 1e-2  # what `onelora.parameter_groups` offers


def losses(folder: Path, tasks: Sequence[Task]) -> dict[tuple[str, float], dict[str, float]]:
    """By rule and rate, for each task the relative loss against its best run of 1LoRA, at any rate by any rule.

    A task without a run at a rate is not among those of the rate.
    """
    found: dict[tuple[str, float], dict[str, float]] = {}
    for task in tasks:
        runs = list(_runs(folder, task))
        if runs:
            top = _score(stages.best(runs, task.chosen_by), task)
            for run in runs:
                found.setdefault((run["rule"], run["rate"]), {})[task.name] = _behind(_score(run, task), top, task)
    return found


def table(folder: Path, tasks: Sequence[Task]) -> str:
    """As Markdown, with the worst task of each rate that all tasks were tried at; "" where nothing was tried."""
    from .tables import markdown  # which imports this file

    known = losses(folder, tasks)
    names = [task.name for task in tasks if any(task.name in row for row in known.values())]
    rows = []
    for rule, rate in sorted(known, key=lambda key: (["", *RULES].index(key[0]), key[1])):
        own = known[rule, rate]
        cells = [_percent(own[name]) if name in own else "–" for name in names]
        worst = _percent(max(own.values())) if len(own) == len(names) else "–"
        rows.append([f"{rule or 'one for all vectors'}, {rate:g}", *cells, worst])
    return markdown(["rule and rate", *names, "worst"], rows) if rows else ""


def against_own_rates(folder: Path, tasks: Sequence[Task]) -> str:
    """One rate by a rule for all tasks beside the plain rate that each task chose: means over seeds, as Markdown.

    All of it is validation data: the chosen rate's runs are those that were tested afterwards.
    """
    from .tables import markdown  # which imports this file

    rows = []
    for task in tasks:
        own = store.read(folder, task.name, "test", ONE_LORA)
        label = store.label({"method": ONE_LORA, "rule": RULE})
        fixed = [run for run in store.read(folder, task.name, "fixed", label) if run["rate"] == RATE]
        if own and fixed:
            mine, ruled = (statistics.fmean(_score(run, task) for run in runs) for runs in (own, fixed))
            text = "{:.3f}" if task.chosen_by == "loss" else "{:.1%}"
            behind = f"{_behind(ruled, mine, task):+.1%}"
            rows.append([task.name, f"{own[0]['rate']:g}", text.format(mine), text.format(ruled), behind])
    return markdown(["", "its own rate", "with it", f"{RULE}, {RATE:g}", "behind"], rows) if rows else ""


def _runs(folder: Path, task: Task) -> Iterator[dict[str, Any]]:
    return (run for run in store.read(folder, task.name, "validation") if run["method"] == ONE_LORA)


def _score(run: dict[str, Any], task: Task) -> float:
    score = run["validation"][task.chosen_by]
    return math.inf if score is None else score  # it diverged


def _behind(score: float, top: float, task: Task) -> float:
    return score / top - 1 if task.chosen_by == "loss" else 1 - score / top


def _percent(share: float) -> str:
    return "diverged" if math.isinf(share) else f"{share:.1%}"
