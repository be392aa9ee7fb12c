"""One adapted linear, forward and backward, by each lowering: against the matmul with pointwise kernels around it, and
against templates with epilogues (Inductor's max_autotune).

Shapes are those of the blocks.  The linear stands between a norm and a GELU, where a compiler can fuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bench_linear import AsPeft, BetweenPointwise, Composite, rates, step
from torch import nn

import onelora_compile as onelora
from gpu.blocks import BLOCKS, SMALL
from onelora_compile.kernels import why_not
from onelora_compile.passes.lowerings import LOWERINGS
from onelora_compile.report.timing import interleaved, ratios

BASE = "frozen linear"
Row = dict[str, Any]


def rows(device: str, small: bool) -> Iterator[Row]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for block_name, block in (SMALL if small else BLOCKS).items():
        for shape in block.linears:
            for row in _one(shape, device, dtype, 3 if small else 15, autotuned=device == "cuda"):
                yield {"block": block_name, "what": "linear", "shape": "x".join(map(str, shape))} | row


def _one(shape: tuple[int, int, int], device: str, dtype: torch.dtype, rounds: int, autotuned: bool) -> Iterator[Row]:
    torch._dynamo.reset()
    count, n, m = shape
    x = torch.randn(count, n, device=device, dtype=dtype, requires_grad=True)
    steps = {way: step(module, x) for way, module in _ways(n, m, device, dtype, autotuned).items()}
    times = interleaved(steps, rounds)
    for way, (median, low, high) in ratios(times, BASE).items():
        seconds = sorted(times[way])[len(times[way]) // 2]
        row = {"way": way, "milliseconds": 1e3 * seconds, "ratio": median, "ratio_p20": low, "ratio_p80": high}
        yield row | rates(count, n, m, seconds)


def _ways(n: int, m: int, device: str, dtype: torch.dtype, autotuned: bool) -> dict[str, Any]:
    def placed(linear: nn.Module, **how: Any) -> Any:
        return torch.compile(BetweenPointwise(linear, n, m).to(device, dtype), **how)

    ways = {
        BASE: placed(nn.Linear(n, m).requires_grad_(False)),
        "composite, Inductor": placed(Composite(n, m)),
        "y + s @ b, Inductor": placed(AsPeft(n, m)),
    }
    if autotuned:
        ways["composite, max_autotune"] = placed(Composite(n, m), mode="max-autotune-no-cudagraphs")
    for name in LOWERINGS:
        if name == "fused_kernel" and (device != "cuda" or why_not(torch.device("cuda", 0))):
            continue
        own = onelora.adapt(nn.Sequential(nn.Linear(n, m)))[0]
        ways[name] = placed(own, backend="onelora", options={"lowering": name})
    return ways
