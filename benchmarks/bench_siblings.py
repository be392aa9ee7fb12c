"""Does it pay on a CPU to multiply q, k and v at once, with one weight that holds the three?

A norm, three linears of one input, attention; forward and backward, under Inductor, CPU time of one thread, ratio to
the three frozen linears.  1LoRA shares the feature sum of the three in either form.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.report.timing import interleaved, ratios

SHAPES = [(512, 384), (2048, 768)]  # rows, width
BASE = "frozen, three matmuls"


class Attention(nn.Module):
    def __init__(self, width: int, together: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = [3 * width] if together else [width] * 3
        self.linears = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        parts = [linear(x) for linear in self.linears]
        if len(parts) == 1:
            parts = list(parts[0].chunk(3, -1))
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=51)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("rows", "width", "way", "median", "20 %", "80 %", title="q, k and v, CPU time of one thread")
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tokens, width in track(SHAPES, "shapes"):
            torch._dynamo.reset()
            torch.manual_seed(0)
            models: dict[str, Any] = {BASE: torch.compile(Attention(width, False))}
            models["frozen, one matmul"] = torch.compile(Attention(width, True))
            for way, together in (("1LoRA, three matmuls", False), ("1LoRA, one matmul", True)):
                models[way] = torch.compile(onelora.adapt(Attention(width, together)), backend="onelora")
            x = torch.randn(8, tokens // 8, width, requires_grad=True)
            up = torch.randn_like(x)

            def step(model: nn.Module, x: Tensor = x, up: Tensor = up) -> None:
                x.grad = None
                model.zero_grad()
                model(x).backward(up)

            steps: dict[str, Callable[[], None]] = {
                way: functools.partial(step, model) for way, model in models.items()
            }
            times = interleaved(steps, arguments.rounds, clock=time.thread_time)
            for way, (median, low, high) in ratios(times, BASE).items():
                table.add_row(str(tokens), str(width), way, f"{median:.3f}", f"{low:.3f}", f"{high:.3f}")
                numbers = {"ratio": round(median, 4), "ratio_p20": round(low, 4), "ratio_p80": round(high, 4)}
                rows.append({"rows": tokens, "width": width, "way": way} | numbers | {"rounds": arguments.rounds})
    save("siblings", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
