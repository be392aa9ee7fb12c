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
    expected = {"base": _outputs(copy.deepcopy(model), x)}
    onelora.adapt(model, adapter_name="a")
    for seed, name in enumerate("ab"):
        if seed:
            onelora.add_adapter(model, name)
            onelora.set_adapter(model, name)
        expected[name] = _outputs(merged_copy(fill_vectors(model, 0.01, seed)), x)
    fast: Any = torch.compile(model, backend="onelora", mode=mode)
    errors, seconds, graphs, before = [], [], 0, _addresses(model)
    with torch.no_grad():
        for turn in range(12):
            name = "ab"[turn % 2]
            start = time.perf_counter()
            onelora.set_adapter(model, name)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            errors.append(_error(fast, x, *expected[name]))
            if turn == 1:
                graphs = _graphs()
        with onelora.disabled(model):
            errors.append(_error(fast, x, *expected["base"]))
    return {
        "what": "switch",
        "milliseconds": 1e3 * sorted(seconds)[len(seconds) // 2],
        "error_ratio": max(errors),
        "new_graphs": _graphs() - graphs,
        "new_addresses": sum(a != b for a, b in zip(before, _addresses(model), strict=True)),
    }


def _outputs(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model computes in its dtype, and in float64, which it is in then."""
    with torch.no_grad():
        return model(x), model.double()(x.double())


def _error(fast: Any, x: torch.Tensor, plain: torch.Tensor, wide: torch.Tensor) -> float:
    """The error of a call, over that of plain PyTorch."""
    torch.compiler.cudagraph_mark_step_begin()
    return ((fast(x).double() - wide).abs().max() / (plain.double() - wide).abs().max()).item()


def _addresses(model: Any) -> list[int]:
    return [vector.data_ptr() for vector in onelora.vectors(model).values()]


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
