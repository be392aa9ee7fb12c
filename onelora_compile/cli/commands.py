"""The command line `onelora`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from onelora_compile.cli.output import fail, print_in_any_locale, show
from onelora_compile.cli.sizes import each_size, parse_axes, parse_sizes
from onelora_compile.cli.user_function import Loaded, load_target
from onelora_compile.errors import ConfigError
from onelora_compile.version import __version__

Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        "--shape",
        help="Of a dynamic dimension, batch=8, or an input, x=8x3; or smallest, usual, largest: batch=1,8,32.",
    ),
]

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
    from onelora_compile.cli.inspect_file import inspect_file

    show(inspect_file(file))


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="module:function that returns (model, args) or (model, args, kwargs).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to load into the model first.")] = None,
    adapters: Annotated[str, typer.Option(help="Where the vectors are: fold, load, input or bank.")] = "fold",
    bank: Annotated[list[Path] | None, typer.Option(help="An adapter of a bank; give it once for each.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset version; the exporter's own choice without.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Convert to float16.")] = False,
    dynamic: Annotated[
        list[str] | None, typer.Option(help="One more dynamic axis: 1=tokens, or of one input, x:2=height.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="The first axis is no dynamic batch.")] = False,
    input_name: Annotated[list[str] | None, typer.Option(help="Another name for an input: x=pixels.")] = None,
    output_name: Annotated[list[str] | None, typer.Option(help="Another name for an output: output=logits.")] = None,
    verify: Annotated[bool, typer.Option(help="Run the file in ONNX Runtime and compare with eager.")] = True,
) -> None:
    """Export a model with its adapter, and verify the file.

    The function is found in the current folder or among the installed packages. The first axis of the inputs is
    exported as the dynamic dimension "batch".
    """
    import torch

    from onelora_compile.cli.dynamic_axes import BATCH, export_dynamic, renamed
    from onelora_compile.exporters import export_onnx
    from onelora_compile.weights.adapter_file import load_adapter
    from onelora_compile.weights.atomic_write import check_writable, refuse_overwriting

    axes = [*([] if static else [BATCH]), *parse_axes(dynamic or ())]
    refuse_overwriting(output, [adapter] if adapter else [], "--output")
    check_writable(output)
    loaded = load_target(target)
    refuse_overwriting(output, loaded.files, "--output")
    with loaded.blamed():
        if first := adapter or next(iter(bank or ()), None):
            load_adapter(loaded.model, first)
        write = functools.partial(
            export_onnx,
            adapters=adapters,
            opset_version=opset,
            dtype=torch.float16 if half else None,
            bank=bank or (),
            verify=verify,
            input_names=renamed("--input-name", input_name or ()),
            output_names=renamed("--output-name", output_name or ()),
        )
        report = export_dynamic(loaded, axes, write, output)
    show(report)


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
    from onelora_compile.weights.atomic_write import refuse_overwriting

    refuse_overwriting(output, calibration or (), "--output")
    report = fold_onnx(
        base,
        adapter,
        output,
        on_unmatched="skip" if skip else "error",
        calibration=[_load_arrays(path) for path in calibration] if calibration else None,
        on_saturation="allow" if keep_ranges else "error",
    )
    show(report)


@app.command()
def bundle(
    model: Annotated[Path, typer.Argument(help="The ONNX model, of any mode.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    jetpack: Annotated[str, typer.Option(help="Of the device: 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")] = "6.2",
    adapter: Annotated[list[Path] | None, typer.Option(help="An adapter to pack; give it once for each.")] = None,
    size: Sizes = None,
    inputs: Annotated[Path | None, typer.Option(help="Arrays for the self-test, a .npz; random ones without.")] = None,
    swap: Annotated[str, typer.Option(help="auto, or refit: vectors of mode input become refittable.")] = "auto",
    weak_fp16: Annotated[bool, typer.Option("--weak-fp16", help="Let TensorRT choose float16 by layer.")] = False,
    workspace_mib: Annotated[int, typer.Option(help="Memory for one kernel while building on the device.")] = 512,
    selftest: Annotated[bool, typer.Option(help="Store reference tensors and check the bundle.")] = True,
) -> None:
    """Write a folder that builds, tests, runs and updates a model on an NVIDIA Jetson, with what JetPack ships."""
    from onelora_compile.exporters import bundle as write_bundle

    report = write_bundle(
        model,
        output,
        jetpack=jetpack,
        adapters=adapter or (),
        shapes=parse_sizes(size or ()),
        inputs=_load_arrays(inputs),
        swap=swap,
        weak_fp16=weak_fp16,
        workspace_mib=workspace_mib,
        selftest=selftest,
    )
    show(report)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter: .safetensors, .onnx_adapter or .vectors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; its ending names the format.")],
    like: Annotated[Path | None, typer.Option(help="The ONNX model that the adapter is for.")] = None,
) -> None:
    """Convert an adapter between this package's format and those of ONNX Runtime."""
    from onelora_compile.exporters import convert_adapter

    show(f"wrote {convert_adapter(source, output, like)}")


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="The ONNX model to check.")],
    reference: Annotated[str, typer.Argument(help="What is right: an ONNX model, or module:function as in export.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to use in both, wherever it can be swapped.")] = None,
    size: Sizes = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs for two ONNX models.")] = 0,
) -> None:
    """Compare an ONNX model with another one or with a model in eager; exit code 1 if more than rounding differs."""
    from onelora_compile.exporters import OnnxRunner
    from onelora_compile.exporters import verify as compare
    from onelora_compile.weights.adapter_file import load_adapter

    sizes = parse_sizes(size or ())

    def runner(path: Path) -> OnnxRunner:
        found = OnnxRunner(path)
        return found.with_adapter(adapter) if adapter and found.mode in ("load", "input", "bank") else found

    if Path(reference).is_file() or ":" not in reference:
        pair = runner(artifact), runner(Path(reference))
        found = [compare(*pair, sizes=one, seed=seed) for one in each_size(sizes)]
    else:
        if sizes:
            raise ConfigError(f"--size is for two ONNX models; the inputs are those that {reference!r} returns")
        loaded = load_target(reference)
        with loaded.blamed():
            if adapter:
                load_adapter(loaded.model, adapter)
            found = [compare(runner(artifact), loaded.model, loaded.args, loaded.kwargs)]
    for one in found:
        show(one)
    if not all(one.passed for one in found):
        raise typer.Exit(1)


@app.command()
def engine(
    model: Annotated[Path, typer.Argument(help="The ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine to write; a manifest goes beside it.")],
    sm: Annotated[list[str] | None, typer.Option(help="GPU to build for, 86 or 8.6; once for each.")] = None,
    size: Sizes = None,
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
        shapes=parse_sizes(size) if size else None,
        adapters=adapters,
        adapter=adapter,
        precision=precision or None,
        workspace=None if workspace is None else workspace * 2**20,
        optimization_level=level,
        timing_cache=timing_cache,
        dla_core=dla_core,
    )
    show(report)


@app.command()
def refit(
    engine: Annotated[Path, typer.Argument(help="An engine that was built with --adapters refit.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter (.safetensors).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The engine to write, in place of it.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="The engine's ONNX model, where TensorRT asks for weights.")] = None,
) -> None:
    """Put another adapter into a finished engine; needs the GPU."""
    from onelora_compile.exporters import refit_engine

    show(refit_engine(engine, adapter, output, onnx))


@app.command()
def bench(
    target: Annotated[str, typer.Argument(help="module:function, as in export; a vision transformer without.")] = "",
    rounds: Annotated[int, typer.Option(help="How often every way is timed.")] = 11,
    compiled: Annotated[bool, typer.Option(help="Also under Inductor.")] = True,
) -> None:
    """Measure a training step on this machine: frozen base and 1LoRA, eager and compiled (minutes)."""
    from onelora_compile.report.bench import bench as measure

    loaded = load_target(target) if target else _own_model()
    with loaded.blamed():
        report = measure(loaded.model, loaded.args, loaded.kwargs, rounds=rounds, compiled=compiled)
    show(report)


@app.command()
def doctor() -> None:
    """Show versions, compiler, runtimes and GPU, and what each means for you."""
    from onelora_compile.cli.inspect_file import doctor_table

    show(doctor_table())


def _load_arrays(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import numpy as np

    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError:
        raise
    except Exception as error:  # of zipfile, zlib, pickle and NumPy
        raise ConfigError(f"{path} is not a .npz file of arrays: {error}") from None


def _own_model() -> Loaded:
    import torch

    from onelora_compile.examples.digits.model import DigitViT

    torch.manual_seed(0)
    return Loaded("", DigitViT(width=384, depth=6, heads=6), (torch.randn(32, 8, 8),), {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 1 after a mistake, 2 after wrong usage, with one line on standard error."""
    print_in_any_locale()
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a mistake in the command's words has it
            fail(error)
            sys.exit(1)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
        else:
            command = getattr(getattr(error, "ctx", None), "command_path", "onelora")
            fail(ConfigError(f"{error.format_message()} ({command} --help shows what it takes)"))
        sys.exit(2)
