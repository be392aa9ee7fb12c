"""Commands on this machine: what it has, how fast it is, the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onelora_compile.cli.app import command

if TYPE_CHECKING:
    from onelora_compile.cli.doctor import Diagnosis
    from onelora_compile.cli.user_function import Loaded
    from onelora_compile.examples.digits.results import DemoResult
    from onelora_compile.report.bench import BenchReport


@command("onelora bench mymodels:make --rounds 21")
def bench(
    target: Annotated[str, typer.Argument(help="module:function, as in export; a vision transformer without.")] = "",
    rounds: Annotated[int, typer.Option(help="How often every way is timed.")] = 11,
    compiled: Annotated[bool, typer.Option(help="Also under Inductor.")] = True,
) -> BenchReport:
    """Measure a training step on this machine: frozen base and 1LoRA, eager and compiled (minutes)."""
    from onelora_compile.cli.user_function import load_target
    from onelora_compile.report.bench import bench as measure

    loaded = load_target(target) if target else _own_model()
    with loaded.blamed():
        return measure(loaded.model, loaded.args, loaded.kwargs, rounds=rounds, compiled=compiled)


@command("onelora doctor")
def doctor() -> Diagnosis:
    """Show versions, compiler, runtimes and GPU, and what each means for you."""
    from onelora_compile.cli.doctor import diagnose

    return diagnose()


@command("onelora demo -o onelora-demo")
def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for what it writes.")] = Path("onelora-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: to see that it runs.")] = False,
) -> DemoResult:
    """Adapt a small vision transformer to shifted digits, compare methods, export to ONNX (about 2 minutes)."""
    from onelora_compile.examples.digits.run import run_demo

    return run_demo(folder, seed=seed, quick=quick)


def _own_model() -> Loaded:
    import torch

    from onelora_compile.cli.user_function import Loaded
    from onelora_compile.examples.digits.model import DigitViT

    torch.manual_seed(0)
    return Loaded("", DigitViT(width=384, depth=6, heads=6), (torch.randn(32, 8, 8),), {})
