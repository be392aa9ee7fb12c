"""What does training keep for backward, and what is its peak, against the frozen base and against PEFT?

Kept: bytes that autograd saves during forward, parameters and inputs not counted.  Peak: the highest sum of
allocations during a step, over what was allocated before it, as the profiler sees them.

Training anything that feeds adaptive norms keeps what they scale and gate, which the frozen base does not need: for
the DiT there is a base in which the biases of adaLN are trained, the least that can be trained there.
"""

from __future__ import annotations

import argparse
import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from environment import save
from models import BASE, MODELS, OWN, build, methods, output, step
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from onelora_compile.examples.measure import peak_bytes
from onelora_compile.testing import saved_bytes

BIASES = "base, adaLN biases trained"
MODES = ("eager", "compiled")


def with_trained_biases(base: nn.Module) -> nn.Module:
    """A copy of a DiT in which the biases of the adaptive norms are trained."""
    twin = copy.deepcopy(base)
    for name, parameter in twin.named_parameters():
        if name.endswith("norm1.linear.bias"):
            parameter.requires_grad_()
    return twin


def measure(name: str, modes: Sequence[str], wanted: Sequence[str] | None) -> list[dict[str, Any]]:
    """Rows of one model; the base is always among the methods."""
    base, inputs = build(name)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        numbers = {}
        torch._dynamo.reset()
        candidates: dict[str, Any] = methods(name, base)
        if name == "dit":
            candidates[BIASES] = with_trained_biases(base)
        for method, model in candidates.items():
            if wanted and method != BASE and method.split()[0] not in wanted:
                continue
            if mode == "compiled":
                model = torch.compile(model, backend="onelora" if method == OWN else "inductor")
            run = step(model, inputs)
            for _ in range(2):
                run()
            kept = saved_bytes(functools.partial(output, model, inputs))
            model.zero_grad()
            next(iter(inputs.values())).grad = None
            numbers[method] = {"kept": kept, "peak": peak_bytes(run)}
        for method, own in numbers.items():
            floor = numbers[BASE]
            relative = {f"{key}_ratio": round(own[key] / floor[key], 4) for key in own}
            rows.append({"model": name, "mode": mode, "method": method, **own, **relative})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--method", nargs="+", help="first words of methods, for example 1LoRA MiSS; default: all")
    arguments = parser.parse_args()
    columns = ("model", "mode", "method", "kept, MB", "ratio", "peak, MB", "ratio")
    table = Table(*columns, title="memory of a training step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jobs = track(arguments.model, "models")
        rows = [row for name in jobs for row in measure(name, arguments.mode, arguments.method)]
    for row in rows:
        cells = (f"{row['kept'] / 1e6:.1f}", f"{row['kept_ratio']:.3f}", f"{row['peak'] / 1e6:.1f}")
        table.add_row(*(str(row[key]) for key in ("model", "mode", "method")), *cells, f"{row['peak_ratio']:.3f}")
    save("memory", rows, key=("model", "mode", "method"))
    Console().print(table)


if __name__ == "__main__":
    main()
