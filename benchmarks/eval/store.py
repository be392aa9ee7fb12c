"""One JSON file for each run, so that a stopped evaluation goes on where it was and every figure can be traced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from onelora_compile.errors import OneLoRAError
from onelora_compile.weights.atomic_write import replacing

RESULTS = Path(__file__).parents[1] / "results" / "eval"
Stage = Literal["validation", "test", "fixed"]


def place(folder: Path, task: str, stage: Stage, method: str, key: str) -> Path:
    """Where the result of a run is: the key is the rate where rates are chosen, else the seed."""
    name = re.sub(r"[^a-z0-9]+", "-", method.lower().replace("+", "and"))
    return folder / task / stage / f"{name}_{key}.json"


def read(folder: Path, task: str, stage: Stage, method: str | None = None) -> list[dict[str, Any]]:
    """All runs of a task in one stage, or those of a method.

    Raises:
        OneLoRAError: a file is no result of a run.
    """
    runs = [_one(path) for path in sorted((folder / task / stage).glob("*.json"))]
    return [run for run in runs if method in (None, label(run))]


def label(run: dict[str, Any]) -> str:
    """The method of a run, with the rule of its rates."""
    return f"{run['method']}, rate {run['rule']}" if run["rule"] else str(run["method"])


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result of a run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _one(path: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        run["method"], run["rule"], run["rate"], run["seed"], run["settings"], run["validation"]["accuracy"]
    except (ValueError, KeyError, TypeError) as error:
        raise OneLoRAError(
            f"{path} is no result of a run ({type(error).__name__}: {error}): remove it, and it is measured again"
        ) from error
    return run
