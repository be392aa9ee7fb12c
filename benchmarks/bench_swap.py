"""What does another adapter cost in a running, compiled model?

File: `load_adapter` (read, check the base, copy).  Copy: values that are in memory already, which is what serving with
a cache of adapters does.  Off and on: a `disabled` block.  No recompilation in any of them is part of the check.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from environment import save
from models import MODELS, build
from rich.console import Console
from rich.progress import track
from rich.table import Table

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def measure(name: str, rounds: int) -> dict[str, object]:
    """Median milliseconds of each way on one model."""
    torch._dynamo.reset()
    model, inputs = build(name)
    onelora.adapt(model)
    fast = torch.compile(model, backend="onelora")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{one}.safetensors" for one in "ab"]
        cached = []
        for file in files:
            fill_vectors(model, 0.1)
            onelora.save_adapter(model, file)
            cached.append({key: vector.detach().clone() for key, vector in onelora.vectors(model).items()})
        size = files[0].stat().st_size

        def copy(values: dict[str, torch.Tensor]) -> None:
            own = onelora.vectors(model)
            with torch.no_grad():
                for key, value in values.items():
                    own[key].copy_(value)

        def toggle() -> None:
            with onelora.disabled(model):
                pass

        with torch.no_grad():
            fast(**inputs)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            ways: dict[str, Callable[[int], object]] = {
                "file": lambda turn: onelora.load_adapter(model, files[turn % 2]),
                "copy": lambda turn: copy(cached[turn % 2]),
                "off and on": lambda _: toggle(),
                "forward": lambda _: fast(**inputs),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(rounds):
                for way, run in ways.items():
                    start = time.perf_counter()
                    run(turn)
                    times[way].append(1e3 * (time.perf_counter() - start))
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    medians = {f"{way}_ms": round(statistics.median(values), 3) for way, values in times.items()}
    return {"model": name, "vectors": len(onelora.vectors(model)), "bytes": size, **medians, "recompilations": graphs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [measure(name, arguments.rounds) for name in track(MODELS, "models")]
    table = Table(*(str(key).replace("_", ", ") for key in rows[0]), title="another adapter, medians")
    for row in rows:
        table.add_row(*map(str, row.values()))
    save("swap", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
