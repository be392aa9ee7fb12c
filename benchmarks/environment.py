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


def save(name: str, rows: Sequence[dict[str, Any]], key: Sequence[str] = ()) -> None:
    """Write rows to results/<name>.csv, each with the environment.

    With `key`, the columns that say what was measured, rows of the file that are not measured now stay, with the
    environment that they were measured in.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    fresh = [{column: str(value) for column, value in (row | environment()).items()} for row in rows]
    kept: list[dict[str, Any]] = []
    if key and path.exists():
        with open(path, newline="") as file:
            kept = list(csv.DictReader(file))

    def what(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[column] for column in (*key, "device", "threads"))

    measured = {what(row): row for row in fresh}
    fresh = [measured.pop(what(row), row) for row in kept] + list(measured.values()) if kept else fresh
    columns = dict.fromkeys([*rows[0], *environment()])
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(fresh)


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
