"""What does an adapter cost in ONNX Runtime, by the way that the model carries it?

Ratio to the base model's export, interleaved rounds in one process; "bank" with rows of the batch that use different
adapters.  Also what it takes to use another adapter.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from environment import save
from models import MODELS, output
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.report.timing import interleaved, ratios
from onelora_compile.testing import fill_vectors, perturb_norms

BASE = "base"
ADAPTERS = 8


class Main(nn.Module):
    """A model with one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        return output(self.model, inputs)


def exports(name: str, folder: Path) -> tuple[dict[str, OnnxRunner], list[Path], dict[str, Any]]:
    """The model in every way, adapters of it, and inputs."""
    torch.manual_seed(0)
    base, inputs = MODELS[name]()
    perturb_norms(base.eval())
    files = []
    for seed in range(ADAPTERS):
        adapted = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.01, seed=seed)
        files.append(folder / f"{seed}.safetensors")
        onelora.save_adapter(adapted, files[-1])
    ways: dict[str, tuple[nn.Module, str, list[Path]]] = {BASE: (base, "fold", [])}
    ways |= {mode: (adapted, mode, []) for mode in ("fold", "load", "input")}
    ways |= {"bank of 1": (adapted, "bank", files[:1]), f"bank of {ADAPTERS}": (adapted, "bank", files)}
    runners = {}
    for way, (model, mode, bank) in ways.items():
        path = folder / f"{way.replace(' ', '_')}.onnx"
        export_onnx(Main(model), (), path, inputs, adapters=mode, bank=bank, verify=False)
        runners[way] = OnnxRunner(path)
    return runners, files, {key: value.detach().numpy() for key, value in inputs.items()}


def call(runner: OnnxRunner, inputs: dict[str, Any]) -> Callable[[], None]:
    rows = len(next(iter(inputs.values())))
    count = len(runner.metadata.adapters)
    feed = runner.feed(inputs, [row % count for row in range(rows)] if runner.mode == "bank" else None)
    return lambda: runner.session.run(None, feed) and None


def swap_ms(runner: OnnxRunner, files: list[Path]) -> float:
    """Milliseconds until another adapter, whose file is not read yet, is in use."""
    if runner.mode not in ("load", "input", "bank"):
        return float("nan")
    times = []
    for number in range(10):
        start = time.perf_counter()
        runner.use(number % len(runner.metadata.adapters) if runner.mode == "bank" else files[number % len(files)])
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["vit", "bert", "llama", "dit"])
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    columns = ("model", "way", "ratio to base", "20 %", "80 %", "ms", "swap ms")
    table = Table(*columns, title="a call in ONNX Runtime")
    rows = []
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for name in track(arguments.model, "models"):
            here = Path(folder) / name
            here.mkdir()
            runners, files, inputs = exports(name, here)
            times = interleaved({way: call(runner, inputs) for way, runner in runners.items()}, arguments.rounds)
            for way, (median, low, high) in ratios(times, BASE).items():
                milliseconds = 1e3 * sorted(times[way])[len(times[way]) // 2]
                numbers = {"ratio": median, "ratio_p20": low, "ratio_p80": high, "ms": milliseconds}
                numbers["swap_ms"] = swap_ms(runners[way], files)
                versions = {"onnxruntime": onnxruntime.__version__, "rounds": arguments.rounds}
                row = {"model": name, "way": way} | {key: round(value, 4) for key, value in numbers.items()} | versions
                rows.append(row)
                table.add_row(name, way, *(f"{value:.3f}" for value in numbers.values()))
    if arguments.model == ["vit", "bert", "llama", "dit"]:
        save("onnx", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
