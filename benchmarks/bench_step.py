"""What does a training step cost, against the frozen base and against PEFT, in eager and compiled?

A step is forward, loss and backward of a vision transformer whose input requires a gradient, so that the frozen base
has a backward too: it is the floor.  The optimizer is left out: it differs by the number of parameters alone.

`--model encoder` is an nn.TransformerEncoder, whose attention reads its weights directly; without the rivals, which
do not adapt all of it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from timing import interleaved, ratios
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import saved_bytes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import TinyViT

LINEARS = ["embed", "qkv", "proj", "fc1", "fc2", "head"]


Measured = tuple[dict[str, Callable[[], None]], dict[str, int]]


def candidates(kind: str, width: int, depth: int, batch: int) -> Measured:
    """A step of each method, and the bytes that it keeps for backward."""
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        base = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).requires_grad_(False)
        models = {"frozen base": base, "1LoRA": onelora.adapt(copy.deepcopy(base))}
        return _measured(models, torch.randn(batch, 16, width, requires_grad=True))
    base = TinyViT(width=width, depth=depth, heads=width // 64, classes=10).requires_grad_(False)
    x = torch.randn(batch, 16, 12, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {
            "frozen base": base,
            "1LoRA": onelora.adapt(copy.deepcopy(base)),
            "MiSS r=1 (PEFT)": peft.get_peft_model(copy.deepcopy(base), peft.MissConfig(r=1, target_modules=LINEARS)),
            "LoRA r=1 (PEFT)": peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=1, target_modules=LINEARS)),
        }
    return _measured(models, x)


def _measured(models: dict[str, nn.Module], x: torch.Tensor) -> Measured:
    runs: dict[str, nn.Module] = {}
    for name, model in models.items():
        runs[f"{name}, eager"] = model
        runs[f"{name}, compiled"] = torch.compile(model, backend="onelora" if name == "1LoRA" else "inductor")
    steps = {name: _step(model, x) for name, model in runs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vectors after fresh norms learn nothing
        for step in steps.values():
            step()
    return steps, {name: saved_bytes(lambda model=model: model(x)) for name, model in runs.items()}


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        x.grad = None
        model(x).square().mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("vit", "encoder"), default="vit")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.output is None:
        name = "step.csv" if arguments.model == "vit" else f"step_{arguments.model}.csv"
        arguments.output = Path(__file__).parent / "results" / name
    torch.manual_seed(0)
    steps, saved = candidates(arguments.model, arguments.width, arguments.depth, arguments.batch)
    table = Table(title="training step, ratio to the frozen base in the same mode")
    for column in ("method", "mode", "median", "20 %", "80 %", "milliseconds", "kept for backward"):
        table.add_column(column, justify="left" if column in ("method", "mode") else "right")
    rows = []
    times = interleaved(steps, arguments.rounds)
    for mode in ("eager", "compiled"):
        own = {name: values for name, values in times.items() if name.endswith(mode)}
        for name, (median, low, high) in ratios(own, f"frozen base, {mode}").items():
            method = name.rpartition(",")[0]
            seconds = sorted(own[name])[len(own[name]) // 2]
            kept = saved[name] / saved[f"frozen base, {mode}"]
            shape = {"width": arguments.width, "depth": arguments.depth, "batch": arguments.batch}
            numbers = {"ratio": median, "ratio_p20": low, "ratio_p80": high, "ms": 1e3 * seconds, "saved_ratio": kept}
            numbers = {key: round(value, 4) for key, value in numbers.items()}
            rows.append(
                {"method": method, "mode": mode} | shape | {"rounds": arguments.rounds} | numbers | environment()
            )
            texts = (f"{median:.2f}", f"{low:.2f}", f"{high:.2f}", f"{1e3 * seconds:.1f}", f"{kept:.3f} x")
            table.add_row(method, mode, *texts)
    arguments.output.parent.mkdir(exist_ok=True)
    with open(arguments.output, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    Console().print(table)


if __name__ == "__main__":
    main()
