"""The command line `onelora`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from onelora_compile.errors import ConfigError, OneLoRAError
from onelora_compile.version import __version__

app = typer.Typer(
    help="1LoRA: one trained vector per frozen linear, compiled into training and folded into deployed models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for what it writes.")] = Path("onelora-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: to see that it runs.")] = False,
) -> None:
    """Adapt a small vision transformer to shifted digits, compare methods, export to ONNX (about 2 minutes)."""
    from onelora_compile.examples.digits.run import run_demo

    run_demo(folder, seed=seed, quick=quick)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter, an ONNX model, or an engine with its manifest.")],
) -> None:
    """Show what is in a file: vectors and base of an adapter; mode and sizes of a model; what an engine is for."""
    from onelora_compile.inspection import inspect_file

    Console().print(inspect_file(file))


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="module:function that returns (model, args) or (model, args, kwargs).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to load into the model first.")] = None,
    adapters: Annotated[str, typer.Option(help="Where the vectors are: fold, load, input or bank.")] = "fold",
    bank: Annotated[list[Path] | None, typer.Option(help="An adapter of a bank; give it once for each.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset version; the exporter's own choice without.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Convert to float16.")] = False,
    verify: Annotated[bool, typer.Option(help="Run the file in ONNX Runtime and compare with eager.")] = True,
) -> None:
    """Export a model with its adapter, and verify the file.

    The function is found in the current folder or among the installed packages.
    """
    import torch

    from onelora_compile.checkpoint import load_adapter
    from onelora_compile.exporters import export_onnx
    from onelora_compile.files import refuse_overwriting

    refuse_overwriting(output, [adapter] if adapter else [], "--output")
    model, args, kwargs = _load_target(target)
    if first := adapter or next(iter(bank or ()), None):
        load_adapter(model, first)
    report = export_onnx(
        model,
        args,
        output,
        kwargs,
        adapters=adapters,
        opset_version=opset,
        dtype=torch.float16 if half else None,
        bank=bank or (),
        verify=verify,
    )
    Console().print(report)


@app.command()
def fold(
    base: Annotated[Path, typer.Argument(help="An ONNX model of the adapter's base, written by any tool.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter (.safetensors).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write; may be the base.")],
    skip: Annotated[bool, typer.Option("--skip-unmatched", help="Leave out vectors that have no place.")] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Inputs by name, a .npz; once for each. Widens ranges of quantised activations where needed."
        ),
    ] = None,
    keep_ranges: Annotated[
        bool, typer.Option("--keep-ranges", help="Let quantised activations clip what vectors add.")
    ] = False,
) -> None:
    """Put an adapter into the weights of an ONNX model, without PyTorch's model."""
    from onelora_compile.exporters import fold_onnx

    report = fold_onnx(
        base,
        adapter,
        output,
        on_unmatched="skip" if skip else "error",
        calibration=[_load_arrays(path) for path in calibration] if calibration else None,
        on_saturation="allow" if keep_ranges else "error",
    )
    Console().print(report)


@app.command()
def bundle(
    model: Annotated[Path, typer.Argument(help="The ONNX model, of any mode.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    jetpack: Annotated[str, typer.Option(help="Of the device: 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")] = "6.2",
    adapter: Annotated[list[Path] | None, typer.Option(help="An adapter to pack; give it once for each.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help="Range of a dynamic input: x=1x3:4x3:8x3 (smallest, best, largest).")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="Arrays for the self-test, a .npz; random ones without.")] = None,
    swap: Annotated[str, typer.Option(help="auto, or refit: vectors of mode input become refittable.")] = "auto",
    weak_fp16: Annotated[bool, typer.Option("--weak-fp16", help="Let TensorRT choose float16 by layer.")] = False,
    workspace_mib: Annotated[int, typer.Option(help="Memory for one kernel while building on the device.")] = 512,
    selftest: Annotated[bool, typer.Option(help="Store reference tensors and check the bundle.")] = True,
) -> None:
    """Write a folder that builds, tests, runs and updates a model on an NVIDIA Jetson, with what JetPack ships."""
    from onelora_compile.exporters import bundle as write_bundle
    from onelora_compile.exporters.profiles import parse_shapes

    report = write_bundle(
        model,
        output,
        jetpack=jetpack,
        adapters=adapter or (),
        shapes=parse_shapes(shapes or ()),
        inputs=_load_arrays(inputs),
        swap=swap,
        weak_fp16=weak_fp16,
        workspace_mib=workspace_mib,
        selftest=selftest,
    )
    Console().print(report)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter: .safetensors, .onnx_adapter or .vectors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; its ending names the format.")],
    like: Annotated[Path | None, typer.Option(help="The ONNX model that the adapter is for.")] = None,
) -> None:
    """Convert an adapter between this package's format and those of ONNX Runtime."""
    from onelora_compile.exporters import convert_adapter

    Console().print(f"wrote {convert_adapter(source, output, like)}", highlight=False, soft_wrap=True)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="The ONNX model to check.")],
    reference: Annotated[str, typer.Argument(help="What is right: an ONNX model, or module:function as in export.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to use in both, wherever it can be swapped.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Size of a dynamic dimension: batch=8.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs for two ONNX models.")] = 0,
) -> None:
    """Compare an ONNX model with another one or with a model in eager; exit code 1 if more than rounding differs."""
    from onelora_compile.checkpoint import load_adapter
    from onelora_compile.exporters import OnnxRunner
    from onelora_compile.exporters import verify as compare

    try:
        sizes = {name: int(value) for name, _, value in (one.partition("=") for one in size or [])}
    except ValueError as error:
        raise ConfigError(f"--size takes a name and a number, for example batch=8: {error}") from None

    def runner(path: Path) -> OnnxRunner:
        found = OnnxRunner(path)
        return found.with_adapter(adapter) if adapter and found.mode in ("load", "input", "bank") else found

    if Path(reference).is_file() or ":" not in reference:
        found = compare(runner(artifact), runner(Path(reference)), sizes=sizes, seed=seed)
    else:
        model, args, kwargs = _load_target(reference)
        if adapter:
            load_adapter(model, adapter)
        found = compare(runner(artifact), model, args if isinstance(args, (tuple, list)) else (args,), kwargs)
    Console().print(found)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def engine(
    model: Annotated[Path, typer.Argument(help="The ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine to write; a manifest goes beside it.")],
    sm: Annotated[list[str] | None, typer.Option(help="GPU to build for, 86 or 8.6; once for each.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of a dynamic dimension, batch=1,8,32, or input, x=1x3x224x224,8x3x224x224,32x3x224x224."
        ),
    ] = None,
    flavour: Annotated[str, typer.Option(help="auto, tensorrt or rtx.")] = "auto",
    adapters: Annotated[str | None, typer.Option(help="Where the vectors are: fold, input, bank or refit.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to build with, in the place of the model's own.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Allow fp16, bf16 or int8 in a float32 model (TensorRT 8 to 10).")
    ] = None,
    workspace: Annotated[int | None, typer.Option(help="MiB that a layer may use.")] = None,
    level: Annotated[int | None, typer.Option(help="Optimization level, 0 to 5.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="File that makes later builds faster.")] = None,
    dla_core: Annotated[int | None, typer.Option(help="Deep learning accelerator of a Jetson.")] = None,
) -> None:
    """Build a TensorRT engine from an ONNX model; TensorRT-RTX does that without a GPU too."""
    from onelora_compile.exporters import build_engine

    report = build_engine(
        model,
        output,
        flavour=flavour,
        target=sm or None,
        shapes=dict(map(_shape, shape)) if shape else None,
        adapters=adapters,
        adapter=adapter,
        precision=precision or None,
        workspace=None if workspace is None else workspace * 2**20,
        optimization_level=level,
        timing_cache=timing_cache,
        dla_core=dla_core,
    )
    Console().print(report)


@app.command()
def refit(
    engine: Annotated[Path, typer.Argument(help="An engine that was built with --adapters refit.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter (.safetensors).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The engine to write, in place of it.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="The engine's ONNX model, where TensorRT asks for weights.")] = None,
) -> None:
    """Put another adapter into a finished engine; needs the GPU."""
    from onelora_compile.exporters import refit_engine

    Console().print(refit_engine(engine, adapter, output, onnx))


@app.command()
def bench(
    target: Annotated[str, typer.Argument(help="module:function, as in export; a vision transformer without.")] = "",
    rounds: Annotated[int, typer.Option(help="How often every way is timed.")] = 11,
    compiled: Annotated[bool, typer.Option(help="Also under Inductor.")] = True,
) -> None:
    """Measure a training step on this machine: frozen base and 1LoRA, eager and compiled (minutes)."""
    from onelora_compile.bench import bench as measure

    made = _load_target(target) if target else _own_model()
    Console().print(measure(*made, rounds=rounds, compiled=compiled))


@app.command()
def doctor() -> None:
    """Show versions, compiler, runtimes and GPU, and what each means for you."""
    from onelora_compile.inspection import doctor_table

    Console().print(doctor_table())


def _load_arrays(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, AttributeError, EOFError) as error:
        raise ConfigError(f"{path} is not a .npz file of arrays: {error}") from None


def _own_model() -> tuple[Any, Any, dict[str, Any]]:
    import torch

    from onelora_compile.examples.digits.model import DigitViT

    torch.manual_seed(0)
    return DigitViT(width=384, depth=6, heads=6), (torch.randn(32, 8, 8),), {}


def _load_target(target: str) -> tuple[Any, Any, dict[str, Any]]:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{target!r} is not of the form module:function, for example mymodels:make_vit")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{target!r}: {error}; run the command in the folder that holds the module") from error
    except AttributeError as error:
        raise ConfigError(f"{target!r}: the module {module_name!r} has no {name!r}") from error
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ConfigError(f"{target!r} must return (model, args) or (model, args, kwargs), not {type(made).__name__}")
    model, args = made[:2]
    return model, args, dict(made[2]) if len(made) == 3 else {}


def _shape(text: str) -> tuple[str, Any]:
    """batch=1,8,32 or x=1x3,8x3,32x3, as `build_engine` takes it."""
    name, _, sizes = text.rpartition("=")
    try:
        parts = [tuple(map(int, one.split("x"))) for one in sizes.split(",")]
    except ValueError:
        parts = []
    if not name or len(parts) not in (1, 3):
        raise ConfigError(f"--shape {text!r} is not of the form batch=1,8,32 or x=1x3x224x224,8x3x224x224,32x3x224x224")
    if "x" not in sizes:  # a dimension, or an input of one
        numbers = [one[0] for one in parts]
        return name, numbers[0] if len(numbers) == 1 else tuple(numbers)
    return name, parts if len(parts) == 3 else parts[0]


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 1."""
    try:
        app()
    except (OneLoRAError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
