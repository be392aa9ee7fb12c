"""Where a measurement was taken, and its file: CSV rows that carry machine, versions, commit and date."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def save(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to results/<name>.csv, each with the environment."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *environment()], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | environment() for row in rows)


@functools.cache
def environment() -> dict[str, str]:
    """Device, versions, commit and date."""
    command = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).parent
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
