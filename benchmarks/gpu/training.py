"""A training step of a block: time, peak and kept memory, against the frozen block and PEFT's rivals."""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import onelora_compile as onelora
from gpu.blocks import BLOCKS, SMALL
from onelora_compile.examples.measure import peak_bytes
from onelora_compile.report.timing import interleaved, ratios
from onelora_compile.testing import saved_bytes

BASE, OWN = "frozen base", "1LoRA"
Row = dict[str, Any]


def rows(device: str, small: bool) -> Iterator[Row]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, block in (SMALL if small else BLOCKS).items():
        base, x = block.build(device, dtype)
        rivals = _rivals(base)
        if not rivals:
            yield {"block": name, "what": "MiSS and LoRA of PEFT", "skipped": "peft is not installed"}
        models: dict[str, Any] = {BASE: base, OWN: onelora.adapt(copy.deepcopy(base)), **rivals}
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                torch._dynamo.reset()
                models = {
                    way: torch.compile(model, backend="onelora" if way == OWN else "inductor")
                    for way, model in models.items()
                }
            steps: dict[str, Callable[[], None]] = {
                way: functools.partial(_step, model, x) for way, model in models.items()
            }
            times = interleaved(steps, 5 if small else 15)
            for way, (median, low, high) in ratios(times, BASE).items():
                kept = saved_bytes(functools.partial(models[way], x))
                numbers = {"kept_bytes": kept, "peak_bytes": peak_bytes(steps[way])}
                milliseconds = 1e3 * sorted(times[way])[len(times[way]) // 2]
                row = {"block": name, "mode": mode, "way": way, "what": "training step", "milliseconds": milliseconds}
                yield row | {"ratio": median, "ratio_p20": low, "ratio_p80": high} | numbers


def _step(model: nn.Module, x: torch.Tensor) -> None:
    x.grad = None
    model.zero_grad()
    model(x).square().mean().backward()


def _rivals(base: nn.Module) -> dict[str, nn.Module]:
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError:
        return {}
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    configs = {
        "MiSS r=1 (PEFT)": peft.MissConfig(r=1, target_modules=targets),
        "LoRA r=1 (PEFT)": peft.LoraConfig(r=1, target_modules=targets),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {way: peft.get_peft_model(copy.deepcopy(base), config) for way, config in configs.items()}
