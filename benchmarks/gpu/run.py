"""Everything that a GPU can prove, in one command: `make gpu`.

Each part runs in a process of its own with a limit, and writes its rows as it measures them, so that nothing that fails
or takes too long loses what was measured.  One CSV, and a verdict for each claim of the documents.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # what other benchmarks share

from gpu.parts import PARTS, Part
from gpu.verdicts import CLAIMS, prepared, verdict

Row = dict[str, Any]


def missing(part: Part, device: str) -> str:
    """Why a part can't run here; "" if it can."""
    if part.cuda and device != "cuda":
        return "needs a CUDA GPU"
    for need in part.needs:
        names = (need,) if isinstance(need, str) else need
        if not any(importlib.util.find_spec(name) for name in names):
            return f"{' or '.join(names)} is not installed"
    return ""


def run_part(part: Part, device: str, small: bool, seconds: float) -> list[Row]:
    """The rows of a part, the last of which says how it ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "rows", Path(folder) / "log"
        command = [sys.executable, __file__, "--part", part.module, "--rows", str(file), "--device", device]
        with log.open("w") as output:
            process = subprocess.Popen(
                command + ["--small"] * small, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(seconds)
                end = "done" if code == 0 else f"failed: {_last_line(log)}"
            except subprocess.TimeoutExpired:
                end = f"stopped after {seconds:.0f} s"
            finally:
                _end_session(process)
        lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
    took = round(time.monotonic() - started, 1)
    return [{"part": part.name, **row} for row in (*rows, {"what": "part", "note": end, "seconds": took})]


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End it and what it has started: compilers, pytest's workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


def measure(module: str, file: Path, device: str, small: bool) -> None:
    """Run one part in this process, and write each row at once."""
    part = importlib.import_module(module)
    with file.open("w") as output:
        for row in part.rows(device, small):
            output.write(json.dumps(row) + "\n")
            output.flush()


def write(rows: Sequence[Row], path: Path, device: str) -> None:
    """The rows as CSV, each with the environment."""
    where = surroundings(device)
    columns = list(dict.fromkeys(key for row in [*rows, where] for key in row))
    beside = path.with_name(path.name + ".new")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**_rounded(row), **where} for row in rows)
    beside.replace(path)


def _rounded(row: Row) -> Row:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def surroundings(device: str) -> dict[str, str]:
    """Device, driver, versions and commit."""
    import torch
    from environment import environment

    driver = ""
    if device == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    cuda = str(torch.version.cuda) if device == "cuda" else ""
    return environment() | {"run_on": name, "driver": driver, "cuda": cuda}


def show(rows: Sequence[Row]) -> None:
    """The verdicts, and how each part ended."""
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "verdict", "by", title="what this machine says")
    ready = prepared(rows)
    for claim in CLAIMS:
        table.add_row(claim.text, *verdict(claim, ready))
    ends = Table("part", "end", "seconds")
    for row in rows:
        if row.get("what") == "part":
            ends.add_row(row["part"], row["note"], str(row.get("seconds", "")))
        elif isinstance(row.get("skipped"), str):  # a part of a part; pytest counts its own
            ends.add_row(row["part"], f"{row['what']}: skipped, {row['skipped']}", "")
    Console().print(table, ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small blocks: whether it works, not how fast")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu.csv")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure(arguments.part, arguments.rows, arguments.device, arguments.small)
        return
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("PyTorch sees no CUDA GPU here; --device cpu --small walks the same paths on the CPU")
    left = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    for part in PARTS:
        if arguments.only and part.name not in arguments.only:
            continue
        # How long a CPU takes says nothing, so only the whole run has a limit there.
        seconds = min(part.seconds if arguments.device == "cuda" else math.inf, left - time.monotonic())
        why = missing(part, arguments.device) or ("" if seconds > 5 else "no time is left")
        print(f"{part.name}: {f'skipped, {why}' if why else f'at most {seconds:.0f} s'}", flush=True)
        ended = {"part": part.name, "what": "part", "note": f"skipped: {why}"}
        rows += [ended] if why else run_part(part, arguments.device, arguments.small, seconds)
        write(rows, arguments.out, arguments.device)
    show(rows)
    print(f"rows: {arguments.out}")


if __name__ == "__main__":
    main()
