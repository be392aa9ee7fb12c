"""Which spelling of the update does Inductor compile best on a CPU, over whole models?

    lowered      what the backend writes: addcmul forward, the vector's gradient as a matmul in backward
    addcmul      the same with the gradient that autograd derives: a product of the size of g and a column reduction
    y + s @ b    PEFT's form, a matmul in both directions

CPU time of one thread, which does not count what else runs on the machine: differences of 1 % can be told, where
wall time of two threads on a shared machine spreads by 8 %.  Models of `models.py` with two blocks; a step is forward,
loss and backward to the inputs; ratios to the frozen base under Inductor.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import models
import peft
import torch
from environment import save
from models import BASE, MODELS, build, step
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, fx, nn

import onelora_compile as onelora
from onelora_compile.dynamo.private_api import copy_graph, inner_compiler
from onelora_compile.passes import run_passes
from onelora_compile.passes.lowerings.producer_consumer import ADD_RANK1_BY_MATMUL
from onelora_compile.report.timing import interleaved, ratios
from onelora_compile.testing import fill_vectors

DEPTH = 2
LOWERED, MISS = "lowered", "MiSS r=1 (PEFT)"


def outer(y: Tensor, s: Tensor, vector: Tensor) -> Tensor:
    return y + s @ vector[None]


SPELLINGS: dict[str, Callable[..., Tensor]] = {"addcmul": torch.addcmul, "y + s @ b": outer}


def backend(spelling: Callable[..., Tensor]) -> Callable[..., Any]:
    """The backend "onelora" with another operator in the place of its own."""

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        gm = copy_graph(gm)
        run_passes(gm)
        for node in gm.graph.find_nodes(op="call_function", target=ADD_RANK1_BY_MATMUL):
            node.target = spelling
        gm.recompile()
        return inner_compiler("inductor", None, {})(gm, inputs)

    return compiler


def compiled(name: str) -> tuple[dict[str, nn.Module], models.Inputs]:
    torch._dynamo.reset()
    base, inputs = build(name)
    own = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    ways: dict[str, Any] = {BASE: torch.compile(base), LOWERED: torch.compile(own, backend="onelora")}
    for spelling, function in SPELLINGS.items():
        ways[spelling] = torch.compile(copy.deepcopy(own), backend=backend(function))
    if name != "encoder":  # PEFT does not adapt weights that are read directly
        config = peft.MissConfig(r=1, target_modules=list(onelora.vectors(own)))
        ways[MISS] = torch.compile(peft.get_peft_model(copy.deepcopy(base), config).eval())
    return ways, inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models.DEPTH = DEPTH
    table = Table(
        "model", "spelling", "median", "20 %", "80 %", title="training step, CPU time of one thread, ratio to base"
    )
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in track(arguments.model, "models"):
            ways, inputs = compiled(name)
            steps = {way: step(model, inputs) for way, model in ways.items()}
            times = interleaved(steps, arguments.rounds, clock=time.thread_time)
            for way, (median, low, high) in ratios(times, BASE).items():
                table.add_row(name, way, f"{median:.3f}", f"{low:.3f}", f"{high:.3f}")
                numbers = {"ratio": round(median, 4), "ratio_p20": round(low, 4), "ratio_p80": round(high, 4)}
                rows.append({"model": name, "spelling": way} | numbers | {"rounds": arguments.rounds})
    if arguments.model == list(MODELS):
        save("spelling", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
