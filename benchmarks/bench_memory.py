"""What does training keep for backward, and what is its peak, against the frozen base and against PEFT?

Kept: bytes that autograd saves during forward, parameters and inputs not counted.  Peak: the highest sum of
allocations during a step, over what was allocated before it, as the profiler sees them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import torch
from environment import save
from models import BASE, MODELS, OWN, build, methods, output, step
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from onelora_compile.testing import saved_bytes


def peak_bytes(run: Callable[[], None]) -> int:
    """The highest sum of allocations during a call.

    Source: the "[memory]" events of torch/autograd/profiler.py::profile._parse_kineto_results, torch 2.13.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def measure(name: str) -> list[dict[str, object]]:
    """Rows of one model."""
    base, inputs = build(name)
    rows: list[dict[str, object]] = []
    for mode in ("eager", "compiled"):
        numbers = {}
        torch._dynamo.reset()
        for method, model in methods(name, base).items():
            if mode == "compiled":
                model = torch.compile(model, backend="onelora" if method == OWN else "inductor")
            run = step(model, inputs)
            for _ in range(2):
                run()
            kept = saved_bytes(lambda model=model: output(model, inputs))
            model.zero_grad()
            next(iter(inputs.values())).grad = None
            numbers[method] = {"kept": kept, "peak": peak_bytes(run)}
        for method, own in numbers.items():
            floor = numbers[BASE]
            relative = {f"{key}_ratio": round(own[key] / floor[key], 4) for key in own}
            rows.append({"model": name, "mode": mode, "method": method, **own, **relative})
    return rows


def main() -> None:
    columns = ("model", "mode", "method", "kept, MB", "ratio", "peak, MB", "ratio")
    table = Table(*columns, title="memory of a training step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row for name in track(MODELS, "models") for row in measure(name)]
    for row in rows:
        cells = (f"{row['kept'] / 1e6:.1f}", f"{row['kept_ratio']:.3f}", f"{row['peak'] / 1e6:.1f}")
        table.add_row(*(str(row[key]) for key in ("model", "mode", "method")), *cells, f"{row['peak_ratio']:.3f}")
    save("memory", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
