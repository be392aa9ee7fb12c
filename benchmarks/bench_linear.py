"""What does one adapted linear cost by each way of computing it, forward and backward, against the frozen linear?

Eager: the linear alone.  Compiled: the linear between a LayerNorm and a GELU, where the compiler may fuse the feature
sum into the kernel before and the update into the kernel after, and between two attention kernels, where it can't.

Ways: what adapted modules do; the composite operator as it is; PEFT's form, y + s @ b; one autograd function (in eager
that is what adapted modules do); augmented K, [x, s] · [W, b]ᵀ, whose wider weight is kept beside the parameter here
and gets b at each step.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import interleaved, ratios
from torch import Tensor, nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.eager import adapted_linear
from onelora_compile.ops import rank1_update

SHAPES = [  # rows, in_features, out_features
    (512, 384, 384),
    (512, 384, 1536),
    (512, 1536, 384),
    (2048, 768, 768),
    (2048, 768, 3072),
    (256, 4096, 4096),
]
COMPILED = ((512, 384, 1536), (512, 1536, 384), (2048, 768, 768))  # a minute of compilation each
BASE, OWN = "frozen linear", "1LoRA"
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
    classes = {"composite": Composite, "y + s @ b": AsPeft, "function": Function, "augmented K": Augmented}
    ways = {name: make(n, m) for name, make in classes.items()}
    return {BASE: nn.Linear(n, m).requires_grad_(False), OWN: own, **ways, "augmented K, bound": AugmentedOnce(n, m)}


def candidates(place: str, rows: int, n: int, m: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of one linear in one place, by each way."""
    torch._dynamo.reset()
    models = linears(n, m)
    if place == "alone":
        del models["function"]  # is what 1LoRA does here
    else:
        wrap = BetweenPointwise if place == "pointwise" else BetweenAttention
        backend = {OWN: "onelora"}
        models = {
            way: torch.compile(wrap(linear, n, m), backend=backend.get(way, "inductor"))
            for way, linear in models.items()
        }
    x = torch.randn(8, rows // 8, n, requires_grad=True)

    def step(model: nn.Module) -> Callable[[], None]:
        up = torch.randn_like(model(x))

        def run() -> None:
            x.grad = None
            model.zero_grad()
            model(x).backward(up)

        return run

    return {way: step(model) for way, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--place", nargs="+", default=["alone", "pointwise", "attention"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    columns = ("place", "rows", "in", "out", "way", "median", "20 %", "80 %")
    table = Table(*columns, title="one linear, forward and backward, ratio to the frozen linear")
    rows = []
    jobs = [(place, *shape) for place in arguments.place for shape in (SHAPES if place == "alone" else COMPILED)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, *shape in track(jobs, "linears"):
            times = interleaved(candidates(place, *shape), arguments.rounds)
            for way, (median, low, high) in ratios(times, BASE).items():
                table.add_row(place, *map(str, shape), way, f"{median:.3f}", f"{low:.3f}", f"{high:.3f}")
                row = {"place": place} | dict(zip(("rows", "in_features", "out_features"), shape, strict=True))
                numbers = {"ratio": round(median, 4), "ratio_p20": round(low, 4), "ratio_p80": round(high, 4)}
                rows.append(row | {"way": way} | numbers | {"rounds": arguments.rounds})
    if len(arguments.place) == 3:
        save("linear", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
