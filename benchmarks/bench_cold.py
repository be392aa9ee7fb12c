"""How long until the first result: the adapted model by "onelora" against its frozen base by plain Inductor?

The adapted model by plain Inductor is measured too: it has the same work to compile, so that what "onelora" takes
beyond it is our own share.  Each measurement is a process of its own with a cache of its own: a cold start, then a
second one on what the first has left.  CPU seconds of the first call, those of the C++ compiler included; the kinds
take turns, and ratios are of neighbours.  Blocks are equal, so Inductor compiles few kernels: the hardest case for
the share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.table import Table
from torch import nn

import onelora_compile as onelora

KINDS = ("base", "plain", "adapted")  # plain: adapted, compiled by Inductor


def first_call(kind: str, linears: int, width: int = 32) -> float:
    """CPU seconds of the first call in inference, after that of a model of two linears."""

    def seconds(linears: int) -> float:
        torch._dynamo.reset()
        blocks = [part for _ in range(linears) for part in (nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())]
        model = nn.Sequential(*blocks).requires_grad_(False)
        if kind != "base":
            onelora.adapt(model)
        compiled = torch.compile(model, backend="onelora" if kind == "adapted" else "inductor")
        start = sum(os.times()[:4])
        with torch.no_grad():
            compiled(torch.randn(4, width))
        return sum(os.times()[:4]) - start

    seconds(2)
    return seconds(linears)


def measured(kind: str, linears: int, cache: str) -> float:
    """`first_call` in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, "--linears", str(linears)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def rounds_of(linears: int, rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds, of each kind of start."""
    seconds: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for taken in seconds.values():  # the second finds what the first has left
                taken.append({kind: measured(kind, linears, f"{folder}/{kind}") for kind in KINDS})
    rows = []
    for start, taken in seconds.items():
        medians = {f"{kind}_s": round(statistics.median(one[kind] for one in taken), 3) for kind in KINDS}
        ratios = {
            f"over_{kind}": round(statistics.median(one["adapted"] / one[kind] for one in taken), 3)
            for kind in KINDS[:2]
        }
        rows.append({"linears": linears, "start": start, "rounds": rounds} | medians | ratios)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--linears", type=int, nargs="+", default=[12, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(first_call(arguments.one, arguments.linears[0]))
        return
    rows = [row for linears in arguments.linears for row in rounds_of(linears, arguments.rounds)]
    columns = ("linears", "start", *(f"{kind}_s" for kind in KINDS), "over_base", "over_plain")
    table = Table(*columns, title="first result, CPU seconds")
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    save("cold", rows, ("linears", "start"))
    Console().print(table)


if __name__ == "__main__":
    main()
