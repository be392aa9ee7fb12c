"""Train, choose rates on validation sentences, test once, print the table.

python -m benchmarks.eval --tasks films                    all methods, three seeds: two hours on two cores, all tasks
python -m benchmarks.eval --tasks films --quick            one rate and one seed of each method: minutes
python -m benchmarks.eval --table                          of the results that are there
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from onelora_compile.examples.measure import machine
from onelora_compile.examples.recipes import accuracy
from onelora_compile.examples.sentences.data import Task, load_tasks
from onelora_compile.examples.sentences.methods import METHODS, trained_numbers
from onelora_compile.examples.sentences.model import SentenceClassifier, Tokens
from onelora_compile.examples.sentences.rates import RATES
from onelora_compile.examples.sentences.train import STEPS, batches, predict, train
from onelora_compile.testing import saved_bytes

from . import store

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)


def run(task: Task, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once and answer the validation sentences, and the test sentences."""
    tokens = Tokens()
    learned, chosen, test = (tokens(part) for part in (task.train, task.validation, task.test))
    torch.manual_seed(seed)
    model = METHODS[method].prepare(SentenceClassifier().eval())
    start = time.perf_counter()
    losses = train(model, learned, rate, STEPS, seed)
    seconds = time.perf_counter() - start
    logits = predict(model, chosen)
    first = next(batches(learned, 1, seed))
    return {
        "task": task.name,
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": STEPS,
        "numbers": trained_numbers(model),
        "kept_bytes": saved_bytes(lambda: F.cross_entropy(model(*first[:2]), first[2])),
        "train_loss": statistics.fmean(losses[-20:]),
        "validation": accuracy(logits, chosen[2]),
        "validation_loss": F.cross_entropy(logits, chosen[2]).item(),
        "test": accuracy(predict(model, test), test[2]),
        "seconds": seconds,
        "machine": machine(),
    }


def table(tasks: list[str]) -> Table:
    """Mean and spread over seeds at the rate that validation chose."""
    shown = Table("task", "method", "numbers", "kept for backward", "rate", "seeds", "validation", "test, mean (range)")
    for task in tasks:
        runs = store.read(task)
        for method in METHODS:
            if (rate := store.best_rate(runs, method)) is None:
                continue
            own = [one for one in runs if one["method"] == method and one["rate"] == rate]
            test = [100 * one["test"] for one in own]
            shown.add_row(
                task,
                method,
                f"{own[0]['numbers']:,}",
                f"{own[0]['kept_bytes'] / 1e6:.1f} MB",
                f"{rate:g}",
                str(len(own)),
                f"{statistics.fmean(100 * one['validation'] for one in own):.1f} %",
                f"{statistics.fmean(test):.1f} % ({min(test):.1f} to {max(test):.1f})",
            )
    return shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["films", "products", "news"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--quick", action="store_true", help="only the demo's rate, only seed 0")
    parser.add_argument("--table", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    console = Console(width=120)
    if not chosen.table:
        tasks = {task.name: task for task in load_tasks()}
        for name in chosen.tasks:
            for method in chosen.methods:
                for rate in [RATES[method]] if chosen.quick else chosen.rates:
                    _once(console, tasks[name], method, rate, 0)
            for method in [] if chosen.quick else chosen.methods:
                for seed in chosen.seeds:
                    if (rate := store.best_rate(store.read(name), method)) is not None:
                        _once(console, tasks[name], method, rate, seed)
    console.print(table(chosen.tasks))


def _once(console: Console, task: Task, method: str, rate: float, seed: int) -> None:
    path = store.place(task.name, method, rate, seed)
    if path.exists():
        return
    result = run(task, method, rate, seed)
    store.write(path, result)
    console.print(
        f"{task.name}, {method}, rate {rate:g}, seed {seed}: {result['validation']:.1%} in {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
