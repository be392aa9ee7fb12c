"""One JSON file for each run, so that a stopped evaluation goes on where it was and every figure can be traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "eval"


def place(task: str, method: str, rate: float, seed: int) -> Path:
    """Where the result of a run is."""
    name = method.replace(",", "").replace("+", "and").replace("=", "").replace(" ", "-").lower()
    return RESULTS / task / f"{name}_{rate:g}_{seed}.json"


def read(task: str) -> list[dict[str, Any]]:
    """All runs of a task."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / task).glob("*.json"))]


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result of a run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def best_rate(runs: list[dict[str, Any]], method: str) -> float | None:
    """The rate with the most right validation answers, of seed 0; the lowest loss decides between equal ones."""
    own = [run for run in runs if run["method"] == method and run["seed"] == 0]
    return max(own, key=lambda run: (run["validation"], -run["validation_loss"]))["rate"] if own else None
