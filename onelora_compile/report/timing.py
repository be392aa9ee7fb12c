"""Interleaved timing: every candidate once per round, in an order that changes, ratios taken within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]


def interleaved(
    candidates: dict[str, Callable[[], None]], rounds: int, repeat: int = 3, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of one call by `clock`, the best of `repeat` in a row, for each candidate in each round."""
    for run in candidates.values():
        for _ in range(2):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    generator = random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            times[name].append(min(_once(candidates[name], clock) for _ in range(repeat)))
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median and 20 and 80 % quantiles of the ratio to `base` in the same round."""
    result = {}
    for name, values in times.items():
        within = [value / reference for value, reference in zip(values, times[base], strict=True)]
        low, *_, high = statistics.quantiles(within, n=5)
        result[name] = (statistics.median(within), low, high)
    return result


def _once(run: Callable[[], None], clock: Clock) -> float:
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start
