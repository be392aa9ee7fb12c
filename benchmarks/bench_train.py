"""What does a training step cost, against the frozen base and against PEFT, in eager and compiled?

A step is forward, loss and backward to the inputs; ratios are to the frozen base in the same mode.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from environment import save
from models import BASE, MODELS, OWN, build, methods, step
from rich.console import Console
from rich.progress import track
from rich.table import Table

from onelora_compile.report.timing import Clock, interleaved, ratios

MODES = ("eager", "compiled")
COLUMNS = ("model", "mode", "method", "median", "20 %", "80 %", "ms")


def measure(
    name: str, rounds: int, modes: Sequence[str], wanted: Sequence[str] | None, clock: Clock
) -> list[dict[str, object]]:
    """Rows of one model, all in one process; the base is always among the methods."""
    base, inputs = build(name)
    models: dict[str, Any] = methods(name, base)
    if wanted:
        models = {method: model for method, model in models.items() if method == BASE or method.split()[0] in wanted}
    rows: list[dict[str, object]] = []
    for mode in modes:
        if mode == "compiled":
            torch._dynamo.reset()
            compiled = {OWN: "onelora"}
            models = {
                method: torch.compile(model, backend=compiled.get(method, "inductor"))
                for method, model in models.items()
            }
        steps = {method: step(model, inputs) for method, model in models.items()}
        times = interleaved(steps, rounds, clock=clock)
        for method, (median, low, high) in ratios(times, BASE).items():
            milliseconds = 1e3 * sorted(times[method])[len(times[method]) // 2]
            numbers = {"ratio": median, "ratio_p20": low, "ratio_p80": high, "ms": milliseconds}
            row = {"model": name, "mode": mode, "method": method, "rounds": rounds}
            rows.append(row | {key: round(value, 4) for key, value in numbers.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--method", nargs="+", help="first words of methods, for example 1LoRA MiSS; default: all")
    parser.add_argument(
        "--one-thread", action="store_true", help="CPU time of one thread, for a machine with other work"
    )
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.one_thread:
        torch.set_num_threads(1)
        clock = time.thread_time
    table = Table(*COLUMNS, title="training step, ratio to the frozen base in the same mode")
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in track(arguments.model, "models"):
            rows += measure(name, arguments.rounds, arguments.mode, arguments.method, clock)
            save("train", rows, key=("model", "mode", "method"))
    for row in rows:
        numbers = [f"{row[key]:.3f}" for key in ("ratio", "ratio_p20", "ratio_p80")]
        table.add_row(*(str(row[key]) for key in ("model", "mode", "method")), *numbers, f"{row['ms']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
