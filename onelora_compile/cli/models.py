"""Commands on adapters and ONNX models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onelora_compile.cli.choices import ExportMode, PeftFormat, Runtime
from onelora_compile.cli.sizes import each_size, parse_axes, parse_sizes
from onelora_compile.cli.typer_app import Output, Sizes, command, file_to_write, load_arrays
from onelora_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from onelora_compile.cli.inspect_file import Content
    from onelora_compile.cli.reports import Combination, Comparisons, Conversion
    from onelora_compile.exporters import ExportReport, FoldReport, OnnxRunner, RangeReport


@command("onelora inspect a.safetensors", "onelora inspect model.onnx --json")
def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="An adapter (owner/name: on the Hub), an ONNX model, an engine, or a bundle."),
    ],
) -> Content:
    """Show what is in a file: vectors and base of an adapter; mode and sizes of a model; what an engine is for."""
    from onelora_compile.cli.inspect_file import inspect_file

    return inspect_file(file)


@command(
    "onelora export mymodels:make -o model.onnx --adapter a.safetensors",
    "onelora export mymodels:make -o base.onnx --dynamic 1=tokens",
    "onelora export mymodels:make -o model.pt2 --to pt2 --adapter a.safetensors --adapters input",
)
def export(
    target: Annotated[str, typer.Argument(help="module:function that returns (model, args) or (model, args, kwargs).")],
    output: Output,
    to: Annotated[
        Runtime, typer.Option(help="What reads the file; pt2 is torch.export, aoti AOTInductor.")
    ] = Runtime.ONNX,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to load first; owner/name is on the Hub.")] = None,
    adapters: Annotated[
        ExportMode, typer.Option(help="Where the vectors are; load and bank are for onnx.")
    ] = ExportMode.FOLD,
    bank: Annotated[list[Path] | None, typer.Option(help="An adapter of a bank; give it once for each.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset version; the exporter's own choice without.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Convert to float16.")] = False,
    keep_float32: Annotated[
        list[str] | None,
        typer.Option(help="With --half: auto, or an operator that stays in float32, * for any part; once for each."),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Inputs by name, a .npz, to measure ranges on for auto; once for each. Else the example."),
    ] = None,
    dynamic: Annotated[
        list[str] | None, typer.Option(help="One more dynamic axis: 1=tokens, or of one input, x:2=height.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="The first axis is no dynamic batch.")] = False,
    input_name: Annotated[list[str] | None, typer.Option(help="Another name for an input: x=pixels.")] = None,
    output_name: Annotated[list[str] | None, typer.Option(help="Another name for an output: output=logits.")] = None,
    verify: Annotated[bool, typer.Option(help="Run the file and compare with eager.")] = True,
) -> ExportReport:
    """Export a model with its adapter, and verify the file.

    The function is found in the current folder or among the installed packages. The first axis of the inputs is
    exported as the dynamic dimension "batch"; for executorch the sizes are the example's. --bank, --opset, --half,
    --keep-float32, --calibration, --input-name and --output-name are for onnx.
    """
    import torch

    from onelora_compile.cli.dynamic_axes import BATCH, export_dynamic, renamed
    from onelora_compile.cli.user_function import load_target
    from onelora_compile.exporters import export_onnx, export_runtime
    from onelora_compile.weights.atomic_write import check_writable, refuse_overwriting
    from onelora_compile.weights.loading import load_adapter

    write: Callable[..., ExportReport]
    if to is Runtime.ONNX:
        write = functools.partial(
            export_onnx,
            adapters=adapters.value,
            opset_version=opset,
            dtype=torch.float16 if half else None,
            bank=bank or (),
            verify=verify,
            keep_float32=keep_float32 or None,
            calibration=[load_arrays(path) for path in calibration] if calibration else None,
            input_names=renamed("--input-name", input_name or ()),
            output_names=renamed("--output-name", output_name or ()),
        )
    else:
        alone = {"--bank": bank, "--opset": opset, "--half": half, "--input-name": input_name}
        alone |= {"--output-name": output_name, "--keep-float32": keep_float32, "--calibration": calibration}
        if given := [option for option, value in alone.items() if value]:
            raise ConfigError(f"{given[0]} is for --to onnx, not for {to}")
        if dynamic and to is Runtime.EXECUTORCH:
            raise ConfigError("--dynamic: executorch needs the largest size of an axis, which export_runtime takes")
        write = functools.partial(export_runtime, runtime=to.value, adapters=adapters.value, verify=verify)
    axes = [*([] if static or to is Runtime.EXECUTORCH else [BATCH]), *parse_axes(dynamic or ())]
    refuse_overwriting(output, [*([adapter] if adapter else []), *(calibration or [])], "--output")
    check_writable(output)
    loaded = load_target(target)
    refuse_overwriting(output, loaded.files, "--output")
    with loaded.blamed():
        if first := adapter or next(iter(bank or ()), None):
            load_adapter(loaded.model, first)
        return export_dynamic(loaded, axes, write, output)


@command("onelora ranges model.onnx inputs.npz", "onelora ranges base.onnx inputs.npz --adapter a.safetensors")
def ranges(
    model: Annotated[Path, typer.Argument(help="The ONNX model, of any mode.")],
    inputs: Annotated[list[Path], typer.Argument(help="Inputs by name, a .npz each.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to fold into a base, or to use.")] = None,
) -> RangeReport:
    """Show how large a model's values are on inputs, with its adapter and without: what float16 can't hold.

    Fails if the file has float16 where a value overflows.
    """
    from onelora_compile.exporters import ranges as measure_ranges

    return measure_ranges(model, [load_arrays(path) for path in inputs], adapter)


@command("onelora fold base.onnx a.safetensors -o folded.onnx")
def fold(
    base: Annotated[Path, typer.Argument(help="An ONNX model of the adapter's base, written by any tool.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter: .safetensors, a folder, owner/name on the Hub.")],
    output: Annotated[Path, file_to_write("The ONNX file to write; may be the base.")],
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
    fewer: Annotated[
        bool, typer.Option("--allow-missing-uses", help="The file leaves out a part that uses a weight again.")
    ] = False,
) -> FoldReport:
    """Put an adapter into the weights of an ONNX model, without PyTorch's model."""
    from onelora_compile.exporters import fold_onnx
    from onelora_compile.weights.atomic_write import refuse_overwriting

    refuse_overwriting(output, calibration or (), "--output")
    return fold_onnx(
        base,
        adapter,
        output,
        on_unmatched="skip" if skip else "error",
        calibration=[load_arrays(path) for path in calibration] if calibration else None,
        on_saturation="allow" if keep_ranges else "error",
        on_missing_uses="allow" if fewer else "error",
    )


@command(
    "onelora convert a.safetensors -o a.onnx_adapter --like input.onnx",
    "onelora convert a.safetensors -o peft_folder --to peft",
    "onelora convert llm.safetensors -o llm.gguf --base base_folder",
    "onelora convert peft_folder -o b.safetensors",
    "onelora convert llm.gguf -o llm.safetensors --base base_folder",
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="An adapter: .safetensors, .onnx_adapter, .vectors, .gguf, a folder of PEFT, owner/name on the Hub."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="PATH", help="What to write; an ending names the format, a folder is PEFT's."
        ),
    ],
    like: Annotated[Path | None, typer.Option(help="The ONNX model that the adapter is for.")] = None,
    to: Annotated[
        PeftFormat | None, typer.Option(help="A folder of PEFT: LoRA r=1, which servers read, or MiSS r=1.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Take the best vector of each layer of a LoRA; says what that keeps.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="To or from .gguf, the base: its folder, config.json, or own .gguf; writing compares that."),
    ] = None,
) -> Conversion:
    """Convert an adapter to or from PEFT, ONNX Runtime or llama.cpp (.gguf).

    A folder of PEFT is read if it is LoRA whose lora_A is constant, or MiSS or Bone of r=1; a .gguf if it is such LoRA.
    """
    from onelora_compile.cli.inspect_file import size_of
    from onelora_compile.cli.reports import Conversion
    from onelora_compile.exporters import convert_adapter
    from onelora_compile.weights.adapter_file import read_adapter
    from onelora_compile.weights.file_kinds import GGUF_FILE
    from onelora_compile.weights.hub_download import fetched

    source = fetched(source)
    written = convert_adapter(source, output, like, to.value if to else None, approximate, base)
    foreign = source.is_dir() or source.suffix == GGUF_FILE
    held = read_adapter(source, approximate, base=None if source.is_dir() else base) if foreign else None
    return Conversion(written, size_of(written), held.projection if held else None, not (held and held.unknown))


@command(
    "onelora combine a.safetensors:0.7 b.safetensors:-0.3 -o mix.safetensors",
    "onelora combine a.safetensors:-1 -o minus_a.safetensors",
    "onelora combine a.safetensors:0.5 b.safetensors:0.5 -o mix.safetensors --trained add",
)
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="PATH:WEIGHT", help="Adapters (.safetensors, folders of PEFT, .gguf) with weights."),
    ],
    output: Output,
    trained: Annotated[
        str,
        typer.Option(help="Heads and norms: refuse, drop, from:PATH (that one's), or add what training changed."),
    ] = "refuse",
    base: Annotated[
        Path | None,
        typer.Option(
            help="For --trained add, if weights do not add up to 1: the base (.safetensors). For .gguf: as in convert."
        ),
    ] = None,
) -> Combination:
    """Add adapters of one base with weights of any sign, without a model.

    The weight is behind the last colon. One adapter alone is scaled, or negated. All must be of one base, which their
    fingerprints tell.
    """
    import warnings

    from onelora_compile.cli.reports import Combination
    from onelora_compile.cli.weighted_files import parse_weighted
    from onelora_compile.errors import OneLoRAWarning
    from onelora_compile.weights.combine import combine as add

    with warnings.catch_warnings():  # the report says it
        warnings.simplefilter("ignore", OneLoRAWarning)
        made = add(parse_weighted(adapters), output, trained=trained, base=base)
    return Combination.of(made, output)


@command(
    "onelora verify folded.onnx mymodels:make --adapter a.safetensors",
    "onelora verify base.onnx base.onnx --size batch=1,8,32",
)
def verify(
    artifact: Annotated[Path, typer.Argument(help="The ONNX model to check.")],
    reference: Annotated[str, typer.Argument(help="What is right: an ONNX model, or module:function as in export.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to use in both, wherever it can be swapped.")] = None,
    size: Sizes = None,
) -> Comparisons:
    """Compare an ONNX model with another one or with a model in eager; exit code 1 if more than rounding differs.

    Two ONNX models get random inputs, of each --size. A module:function brings its own inputs, so --size is refused
    there: only the function knows which numbers its model takes.
    """
    from onelora_compile.cli.reports import Comparisons
    from onelora_compile.cli.user_function import load_target
    from onelora_compile.exporters import OnnxRunner
    from onelora_compile.exporters import verify as compare
    from onelora_compile.weights.loading import load_adapter

    sizes = parse_sizes(size or ())

    def adapted(runner: OnnxRunner) -> OnnxRunner:
        return runner.with_adapter(adapter) if adapter and not runner.metadata.traits.fixed else runner

    if Path(reference).is_file() or ":" not in reference:
        pair = OnnxRunner(artifact), OnnxRunner(Path(reference))
        if adapter and all(one.metadata.traits.fixed for one in pair):
            held = " and ".join(f"{one.path} (mode {one.mode!r})" for one in pair)
            raise ConfigError(f"--adapter {adapter}: {held} take no adapter: fold it into the base first")
        first, second = map(adapted, pair)
        return Comparisons([compare(first, second, sizes=one) for one in each_size(sizes)])
    if sizes:
        raise ConfigError(f"--size is for two ONNX models; the inputs are those that {reference!r} returns")
    loaded = load_target(reference)
    with loaded.blamed():
        if adapter:
            load_adapter(loaded.model, adapter)
        return Comparisons([compare(adapted(OnnxRunner(artifact)), loaded.model, loaded.args, loaded.kwargs)])
