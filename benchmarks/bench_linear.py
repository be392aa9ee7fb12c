"""What does one adapted linear cost by each way of computing it, forward and backward, against the frozen linear?

Eager: the linear alone.  Compiled: the linear between a LayerNorm and a GELU, where the compiler may fuse the feature
sum into the kernel before and the update into the kernel after, and between two attention kernels, where it can't.

Ways: what adapted modules do; the composite operator as it is; PEFT's form, y + s @ b; one autograd function (in eager
that is what adapted modules do); augmented K, [x, s] · [W, b]ᵀ, whose wider weight is kept beside the parameter here
and gets b at each step.

On a CUDA GPU (not run on one yet): bfloat16, compiled places only, and each lowering forced besides the chosen one.
Rates count the flops and bytes of the linear and of its backward to x.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.adapting.eager_linear import adapted_linear
from onelora_compile.ops import rank1_update
from onelora_compile.passes.lowerings import LOWERINGS
from onelora_compile.report.timing import interleaved, ratios

SHAPES = [  # rows, in_features, out_features
    (512, 384, 384),
    (512, 384, 1536),
    (512, 1536, 384),
    (2048, 768, 768),
    (2048, 768, 3072),
    (256, 4096, 4096),
]
GPU_SHAPES = [(8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096), (4096, 1024, 4096), (64, 4096, 4096)]
COMPILED = ((512, 384, 1536), (512, 1536, 384), (2048, 768, 768))  # a minute of compilation each
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
BASE, OWN = "frozen linear", "1LoRA"
PLACES = ["alone", "pointwise", "attention"]
PADDING = 16  # columns: the feature sum, and zeros that keep rows aligned


class Composite(nn.Linear):
    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.requires_grad_(False)
        self.vector = nn.Parameter(torch.randn(m) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return rank1_update(super().forward(x), x, self.vector)


class AsPeft(Composite):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) + x.sum(-1, keepdim=True) @ self.vector[None]


class Function(Composite):
    def forward(self, x: Tensor) -> Tensor:
        return adapted_linear(x, self.weight, self.bias, self.vector)


class Augmented(Composite):
    wide: Tensor

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.register_buffer("wide", F.pad(self.weight, (0, PADDING)))

    def forward(self, x: Tensor) -> Tensor:
        n = self.in_features
        wide = torch.cat([self.wide[:, :n], self.vector[:, None], self.wide[:, n + 1 :]], 1)
        s = x.sum(-1, keepdim=True)
        return F.linear(torch.cat([x, s, s.new_zeros(*s.shape[:-1], PADDING - 1)], -1), wide, self.bias)


class AugmentedOnce(Augmented):
    """As if the vector had been written into the wider weight for nothing: a bound from below; its vector is dead."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.sum(-1, keepdim=True)
        return F.linear(torch.cat([x, s, s.new_zeros(*s.shape[:-1], PADDING - 1)], -1), self.wide, self.bias)


class BetweenPointwise(nn.Module):
    def __init__(self, linear: nn.Module, n: int, m: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(n).requires_grad_(False), linear
        self.outer = nn.Linear(m, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.linear(self.norm(x))))


class BetweenAttention(nn.Module):
    def __init__(self, linear: nn.Module, n: int, m: int) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x, y = self._attention(x), self._attention(self.linear(self._attention(x)))
        return y.sum(-1) + x.sum(-1)

    @staticmethod
    def _attention(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, 64)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def linears(n: int, m: int) -> dict[str, nn.Module]:
    """The linear by each way."""
    own = onelora.adapt(nn.Sequential(nn.Linear(n, m)))[0]
    if CUDA:
        forced = {name: onelora.adapt(nn.Sequential(nn.Linear(n, m)))[0] for name in LOWERINGS}
        return {BASE: nn.Linear(n, m).requires_grad_(False), OWN: own, "y + s @ b": AsPeft(n, m), **forced}
    classes = {"composite": Composite, "y + s @ b": AsPeft, "function": Function, "augmented K": Augmented}
    ways = {name: make(n, m) for name, make in classes.items()}
    return {BASE: nn.Linear(n, m).requires_grad_(False), OWN: own, **ways, "augmented K, bound": AugmentedOnce(n, m)}


def _compiled(way: str, model: nn.Module) -> nn.Module:
    backend: dict[str, Any] = {"backend": "onelora" if way == OWN else "inductor"}
    if way in LOWERINGS:
        backend = {"backend": "onelora", "options": {"lowering": way}}
    compiled: Any = torch.compile(model, **backend)
    return compiled


def rates(rows: int, n: int, m: int, seconds: float) -> dict[str, float]:
    """TFLOP/s and GB/s (1e9) of the frozen linear; what else runs in `seconds` is not counted as work."""
    flops, moved = 4 * rows * n * m, 2 * DTYPE.itemsize * (rows * n + n * m + rows * m)
    return {"tflop_per_s": round(flops / seconds / 1e12, 4), "gb_per_s": round(moved / seconds / 1e9, 2)}


def candidates(place: str, rows: int, n: int, m: int, ways: Sequence[str] | None) -> dict[str, Callable[[], None]]:
    """Forward and backward of one linear in one place, by each way."""
    torch._dynamo.reset()
    models = linears(n, m)
    if ways:
        models = {way: model for way, model in models.items() if way in (BASE, *ways)}
    if CUDA:
        models = {way: model.to("cuda", torch.bfloat16) for way, model in models.items()}
    if place == "alone":
        models.pop("function", None)  # is what 1LoRA does here
    else:
        wrap = BetweenPointwise if place == "pointwise" else BetweenAttention
        models = {way: _compiled(way, wrap(linear, n, m).to(DEVICE, DTYPE)) for way, linear in models.items()}
    x = torch.randn(8, rows // 8, n, device=DEVICE, dtype=DTYPE, requires_grad=True)
    return {way: step(model, x) for way, model in models.items()}


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, the gradient of the output the same each time."""
    up = torch.randn_like(model(x))

    def run() -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(up)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--place", nargs="+", default=["pointwise", "attention"] if CUDA else PLACES)
    parser.add_argument("--way", nargs="+", help="only these, besides the frozen linear")
    parser.add_argument(
        "--one-thread", action="store_true", help="CPU time of one thread, for a machine with other work"
    )
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.one_thread:
        torch.set_num_threads(1)
        clock = time.thread_time
    torch.manual_seed(0)
    columns = ("place", "rows", "in", "out", "way", "median", "20 %", "80 %")
    table = Table(*columns, title="one linear, forward and backward, ratio to the frozen linear")
    rows = []
    shapes = {"alone": GPU_SHAPES if CUDA else SHAPES}
    compiled = GPU_SHAPES if CUDA else COMPILED
    jobs = [(place, shape) for place in arguments.place for shape in shapes.get(place, compiled)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, shape in track(jobs, "linears"):
            times = interleaved(candidates(place, *shape, arguments.way), arguments.rounds, clock=clock)
            for way, (median, low, high) in ratios(times, BASE).items():
                table.add_row(place, *map(str, shape), way, f"{median:.3f}", f"{low:.3f}", f"{high:.3f}")
                row = {"place": place} | dict(zip(("rows", "in_features", "out_features"), shape, strict=True))
                numbers = {"ratio": round(median, 4), "ratio_p20": round(low, 4), "ratio_p80": round(high, 4)}
                numbers |= {"ms": round(1e3 * statistics.median(times[way]), 4)}
                numbers |= rates(*shape, statistics.median(times[way]))
                rows.append(row | {"way": way} | numbers | {"rounds": arguments.rounds})
            save("linear", rows, key=("place", "rows", "in_features", "out_features", "way"))
    Console().print(table)


if __name__ == "__main__":
    main()
