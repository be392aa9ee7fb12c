"""Other values in a compiled block: the right function, no new graph, no new address, also under CUDA graphs."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch

import onelora_compile as onelora
from gpu.blocks import BLOCKS, SMALL
from onelora_compile.testing import fill_vectors, merged_copy

Row = dict[str, Any]


def rows(device: str, small: bool) -> Iterator[Row]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, block in (SMALL if small else BLOCKS).items():
        base, x = block.build(device, dtype)
        x = x.detach()
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()
            yield {"block": name, "mode": mode} | _swapped(copy.deepcopy(base), x, mode)


def _swapped(model: Any, x: torch.Tensor, mode: str) -> Row:
    onelora.adapt(model, adapter_name="a")
    wide: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for seed, name in enumerate("ab"):
        if seed:
            onelora.add_adapter(model, name)
            onelora.set_adapter(model, name)
        merged = merged_copy(fill_vectors(model, 0.01, seed))
        plain[name] = merged(x)
        wide[name] = merged.double()(x.double())
    fast: Any = torch.compile(model, backend="onelora", mode=mode)
    worst, seconds, graphs = 0.0, [], 0
    with torch.no_grad():
        for turn in range(12):
            name = "ab"[turn % 2]
            start = time.perf_counter()
            onelora.set_adapter(model, name)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            torch.compiler.cudagraph_mark_step_begin()
            error = (fast(x).double() - wide[name]).abs().max().item()
            worst = max(worst, error / (plain[name].double() - wide[name]).abs().max().item())
            if turn == 1:
                graphs = _graphs()
        with onelora.disabled(model):
            pass
    return {
        "what": "switch",
        "milliseconds": 1e3 * sorted(seconds)[len(seconds) // 2],
        "error_ratio": worst,
        "new_graphs": _graphs() - graphs,
    }


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
