"""What do the passes add to a compilation, and do they stay linear in the number of linears?

Own: seconds in the backend outside the inner compiler (copying Dynamo's graph, matching, the passes).  Whole: seconds
of the first call, forward only.  Inductor compiles a kernel for each new shape alone, so equal blocks are the hardest
case for the share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import fx, nn

import onelora_compile as onelora
from onelora_compile.backend import onelora_backend
from onelora_compile.dynamo.private_api import inner_compiler


def measure(linears: int, inner: str) -> dict[str, Any]:
    """Seconds of one compilation."""
    torch._dynamo.reset()
    width = 32
    blocks = [part for _ in range(linears) for part in (nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())]
    model = onelora.adapt(nn.Sequential(*blocks))
    real = inner_compiler(inner, None, {})
    seconds = {"backend": 0.0, "inner": 0.0}

    def timed_inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        start = time.perf_counter()
        compiled = real(gm, inputs)
        seconds["inner"] += time.perf_counter() - start
        return compiled

    def timed(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        start = time.perf_counter()
        compiled = onelora_backend(gm, inputs, options={"inner": timed_inner})
        seconds["backend"] += time.perf_counter() - start
        return compiled

    x = torch.randn(4, width)
    compiled = torch.compile(model, backend=timed)
    start = time.perf_counter()
    with torch.no_grad():
        compiled(x)
    whole = time.perf_counter() - start
    own = seconds["backend"] - seconds["inner"]
    numbers = {"own_s": own, "whole_s": whole, "share": own / whole, "own_ms_per_linear": 1e3 * own / linears}
    return {"linears": linears, "inner": inner} | {key: round(value, 5) for key, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--linears", type=int, nargs="+", default=[10, 30, 100, 300, 1000, 3000])
    parser.add_argument("--inductor-up-to", type=int, default=300, help="beyond it only aot_eager, which is quicker")
    arguments = parser.parse_args()
    measure(3, "inductor")  # what the first compilation of a process loads is nobody's
    jobs = [(n, "aot_eager") for n in arguments.linears]
    jobs += [(n, "inductor") for n in arguments.linears if n <= arguments.inductor_up_to]
    rows = [measure(*job) for job in track(jobs, "compilations")]
    table = Table("linears", "inner", "own, s", "whole, s", "share", "own per linear, ms", title="compilation")
    for row in rows:
        cells = (f"{row['own_s']:.3f}", f"{row['whole_s']:.1f}", f"{row['share']:.1%}")
        table.add_row(str(row["linears"]), row["inner"], *cells, f"{row['own_ms_per_linear']:.2f}")
    save("compile", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
