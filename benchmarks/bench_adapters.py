"""What do many adapters on one base cost, beside PEFT's LoRA of r=1 with as many?

Switch: another active adapter (`set_adapter`).  Mixed: a batch in which each row has an adapter of its own (`rows`,
PEFT's `adapter_names=`).  All forwards without gradients, eager unless it says compiled; rounds are interleaved, and
ratios are medians of the ratios to the frozen base of the same round.  Compilations are counted over eight switches and
three mixes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from environment import save
from models import MODELS, build
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

NAMES = [f"adapter_{number}" for number in range(8)]
ROWS = 32


def ours(base: nn.Module) -> nn.Module:
    """The base with all adapters."""
    model = onelora.adapt(copy.deepcopy(base), adapter_name=NAMES[0])
    for seed, name in enumerate(NAMES):
        if seed:
            onelora.add_adapter(model, name)
            onelora.set_adapter(model, name)
        fill_vectors(model, 0.02, seed)
    return model


def theirs(base: nn.Module) -> Any:
    """The base in PEFT, with as many LoRA on the same linears."""
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=1, target_modules=linears)
    model: Any = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def measure(name: str, rounds: int) -> dict[str, object]:
    """Medians of one model."""
    torch._dynamo.reset()
    base, inputs = build(name)
    inputs = {key: value.detach().repeat(ROWS // len(value), *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    base.eval()
    own, peers = ours(base), theirs(base)
    order = [NAMES[row % len(NAMES)] for row in range(ROWS)]
    fast, fast_base = torch.compile(own, backend="onelora"), torch.compile(copy.deepcopy(base))
    fast_peers = torch.compile(peers)
    turn = iter(range(10**9))

    def mixed(run: Any) -> None:
        with onelora.rows(own, order):
            run(**inputs)

    def names() -> str:
        return NAMES[next(turn) % len(NAMES)]

    ways: dict[str, Callable[[], object]] = {
        "base": lambda: base(**inputs),
        "one adapter": lambda: own(**inputs),
        "mixed": lambda: mixed(own),
        "peft one adapter": lambda: peers(**inputs),
        "peft mixed": lambda: peers(**inputs, adapter_names=order),
        "compiled base": lambda: fast_base(**inputs),
        "compiled one adapter": lambda: fast(**inputs),
        "compiled mixed": lambda: mixed(fast),
        "switch": lambda: onelora.set_adapter(own, names()),
        "peft switch": lambda: peers.set_adapter(names()),
        "open a block": lambda: _opened(own, order),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for count in range(rounds + 2):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if count > 1:  # the first compile
                    times[way].append(1e3 * (time.perf_counter() - start))
        graphs = {
            "ours": _graphs(lambda: _switches(own, fast, inputs, order)),
            "peft": _graphs(lambda: [(peers.set_adapter(one), fast_peers(**inputs)) for one in NAMES]),
        }
    row: dict[str, object] = {"model": name, "adapters": len(NAMES), "rows": ROWS}
    row |= {f"{way}_ms": round(statistics.median(values), 3) for way, values in times.items()}
    for way in ("one adapter", "mixed", "peft one adapter", "peft mixed"):
        row[f"{way}/base"] = _ratio(times[way], times["base"])
    for way in ("compiled one adapter", "compiled mixed"):
        row[f"{way}/compiled base"] = _ratio(times[way], times["compiled base"])
    return row | {"graphs": graphs["ours"], "peft_graphs_of_8_switches": graphs["peft"]}


def _opened(model: nn.Module, order: list[str]) -> None:
    with onelora.rows(model, order):
        pass


def _switches(model: nn.Module, fast: Any, inputs: dict[str, Any], order: list[str]) -> None:
    for name in NAMES:
        onelora.set_adapter(model, name)
        fast(**inputs)
    for shift in range(3):
        with onelora.rows(model, order[shift:] + order[:shift]):
            fast(**inputs)


def _graphs(run: Callable[[], object]) -> int:
    """How many graphs are compiled meanwhile."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run()
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)


def _ratio(values: list[float], floor: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(values, floor, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=["vit", "llama"], choices=list(MODELS))
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [measure(name, arguments.rounds) for name in track(arguments.models, "models")]
    table = Table("", *(str(row["model"]) for row in rows), title="many adapters on one base")
    for key in rows[0]:
        table.add_row(key.replace("_", " "), *(str(row[key]) for row in rows))
    save("adapters", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
