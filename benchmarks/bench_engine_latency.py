"""What does an adapter cost in TensorRT on this GPU, by the way that the engine carries it?

Ratio to the base's engine, interleaved rounds in one process, and what it takes to use another adapter.  Needs a GPU;
not run on one yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

import onelora_compile as onelora
from onelora_compile.exporters import EngineRunner, build_engine, export_onnx
from onelora_compile.report.timing import interleaved, ratios
from onelora_compile.testing import fill_vectors

BASE = "base"
WAYS = {BASE: "fold", "fold": "fold", "input": "input", "refit": "input", "bank": "bank"}  # engine -> ONNX model


def call(engine: EngineRunner, inputs: dict[str, Any]) -> None:
    engine.run(inputs)


def runners(name: str, folder: Path) -> tuple[dict[str, EngineRunner], list[Path], dict[str, Any]]:
    """The engines in float16, two adapters, and inputs."""
    base, inputs = models.build(name)
    half = {key: value.detach().half() if value.is_floating_point() else value for key, value in inputs.items()}
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    options: dict[str, Any] = {"kwargs": half, "verify": False, "progress": False}
    base = base.half()
    export_onnx(base, (), folder / "base.onnx", **options)
    adapted = onelora.adapt(base)
    for seed, file in enumerate(files):
        onelora.save_adapter(fill_vectors(adapted, 0.01, seed=seed), file)
    for mode in ("fold", "input"):
        export_onnx(adapted, (), folder / f"{mode}.onnx", adapters=mode, **options)
    export_onnx(adapted, (), folder / "bank.onnx", adapters="bank", bank=files, **options)
    found = {}
    for way, mode in WAYS.items():
        source = folder / ("base.onnx" if way == BASE else f"{mode}.onnx")
        chosen = way if way in ("input", "refit", "bank") else None
        build_engine(source, folder / f"{way}.engine", adapters=chosen, progress=False)
        found[way] = EngineRunner(folder / f"{way}.engine")
    return found, files, {key: value.cuda() for key, value in half.items()}


def swap_ms(runner: EngineRunner, files: list[Path]) -> float:
    """Milliseconds until another adapter is in use."""
    if runner.mode not in ("input", "refit", "bank"):
        return float("nan")
    times = []
    for turn in range(10):
        start = time.perf_counter()
        runner.use(turn % 2 if runner.mode == "bank" else files[turn % 2])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=models.MODELS, nargs="+", default=["vit", "bert", "llama", "dit"])
    parser.add_argument("--rounds", type=int, default=51)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_engine_latency needs a GPU; what can be measured without one is in bench_engine.py")
    table = Table("model", "engine", "ratio to base", "20 %", "80 %", "ms", "swap ms", title="a call in TensorRT")
    rows = []
    for name in track(arguments.model, "models"):
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            engines, files, inputs = runners(name, Path(folder))
            times = interleaved({way: partial(call, one, inputs) for way, one in engines.items()}, arguments.rounds)
            for way, (median, low, high) in ratios(times, BASE).items():
                milliseconds = 1e3 * float(np.median(times[way]))
                numbers = {"ratio": median, "ratio_p20": low, "ratio_p80": high, "ms": milliseconds}
                numbers["swap_ms"] = swap_ms(engines[way], files)
                rows.append({"model": name, "engine": way} | {key: round(value, 4) for key, value in numbers.items()})
                table.add_row(name, way, *(f"{value:.3f}" for value in numbers.values()))
    save("engine_latency", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
