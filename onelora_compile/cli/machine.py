"""Commands on this machine: what it has, how fast it is, the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onelora_compile.cli.typer_app import command

if TYPE_CHECKING:
    from onelora_compile.cli.doctor import Checkup
    from onelora_compile.cli.user_function import Loaded
    from onelora_compile.examples.sentences.results import DemoResult
    from onelora_compile.report.bench import BenchReport
    from onelora_compile.report.diagnose import LayerReport


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


@command("onelora diagnose mymodels:make")
def diagnose(
    target: Annotated[str, typer.Argument(help="module:function, as in export; best with real data and labels.")],
    layers: Annotated[list[str] | None, typer.Option("--target", help="Only these layers, as target_modules.")] = None,
) -> LayerReport:
    """Tell which layers 1LoRA can move: the share of each gradient that lies along the ones, before any training."""
    from onelora_compile.adapting.config import OneLoRAConfig
    from onelora_compile.cli.user_function import load_target
    from onelora_compile.report.diagnose import diagnose as look

    loaded = load_target(target)
    with loaded.blamed():
        config = OneLoRAConfig(target_modules=layers) if layers else OneLoRAConfig()
        return look(loaded.model, loaded.args, loaded.kwargs, config=config)


@command("onelora doctor")
def doctor() -> Checkup:
    """Show versions, compiler, runtimes and GPU, and what each means for you."""
    from onelora_compile.cli.doctor import examine

    return examine()


@command("onelora demo -o onelora-demo")
def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for what it writes.")] = Path("onelora-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: to see that it runs.")] = False,
) -> DemoResult:
    """Adapt a pretrained sentence encoder to three tasks, compare methods, deploy the adapters (about 3 minutes)."""
    from onelora_compile.examples.sentences.run import run_demo

    return run_demo(folder, quick=quick)


def _own_model() -> Loaded:
    import torch

    from onelora_compile.cli.user_function import Loaded
    from onelora_compile.examples.digits.model import DigitViT

    torch.manual_seed(0)
    return Loaded("", DigitViT(width=384, depth=6, heads=6), (torch.randn(32, 8, 8),), {})
