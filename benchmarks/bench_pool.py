"""What do eight and a thousand adapters take in memory, and a switch between them in time?

Blocks of six linears, with vectors alone and with the norms trained too.  Each kind is a process of its own.  A switch
is CPU time of one thread, the median of 400: what other programs do meanwhile is none of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.table import Table
from torch import nn

import onelora_compile as onelora

KINDS = ("vectors", "vectors and norms")


class Block(nn.Module):
    """The linears and norms of a transformer's block; it is never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def measure(kind: str, adapters: int, blocks: int, width: int) -> dict[str, object]:
    """One kind, in this process."""
    model = nn.Sequential(*(Block(width) for _ in range(blocks)))
    onelora.adapt(model, onelora.OneLoRAConfig(train_norms=kind != KINDS[0]), adapter_name="0")
    numbers, before = sum(one.numel() for one in onelora.trainable_parameters(model)), _mib("VmRSS")
    for number in range(1, adapters):
        onelora.add_adapter(model, str(number))
    onelora.set_adapter(model, "1")
    held, peak = (round(_mib(field) - before) for field in ("VmRSS", "VmHWM"))
    times = []
    for turn in range(400):
        start = time.thread_time()
        onelora.set_adapter(model, str(turn * 7 % adapters))
        times.append(1e3 * (time.thread_time() - start))
    row: dict[str, object] = {"kind": kind, "linears": len(onelora.vectors(model)), "adapters": adapters}
    row |= {"numbers": numbers, "numbers_mib": round(4 * numbers * adapters / 2**20)}
    return row | {"held_mib": held, "peak_mib": peak, "switch_cpu_ms": round(statistics.median(times), 3)}


def _mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 1000])
    parser.add_argument("--blocks", type=int, default=34)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.one, arguments.adapters[0], arguments.blocks, arguments.width)))
        return
    rows: list[dict[str, Any]] = []
    for kind, count in itertools.product(KINDS, arguments.adapters):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, "--adapters", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(*(key.replace("_", " ") for key in rows[0]), title="a pool of adapters")
    for row in rows:
        table.add_row(*map(str, row.values()))
    save("pool", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
