"""Commands on TensorRT engines and bundles for a Jetson."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onelora_compile.cli.choices import BundleLayout, EngineMode, Flavour, JetPack, Precision, Swap
from onelora_compile.cli.sizes import parse_sizes
from onelora_compile.cli.typer_app import Sizes, command, file_to_write, load_arrays

if TYPE_CHECKING:
    from onelora_compile.cli.reports import Signed
    from onelora_compile.exporters import BundleReport, EngineReport, RefitReport


@command("onelora engine model.onnx -o model.engine --sm 86 --size batch=1,8,32")
def engine(
    model: Annotated[Path, typer.Argument(help="The ONNX model.")],
    output: Annotated[Path, file_to_write("The engine to write; a manifest goes beside it.")],
    sm: Annotated[list[str] | None, typer.Option(help="GPU to build for, 86 or 8.6; once for each.")] = None,
    size: Sizes = None,
    flavour: Annotated[Flavour, typer.Option(help="Which TensorRT builds; auto is what is installed.")] = Flavour.AUTO,
    adapters: Annotated[EngineMode | None, typer.Option(help="Where the vectors are; as in the model without.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to build with, in the place of the model's own.")
    ] = None,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="What a float32 model may also compute in (TensorRT 8 to 10).")
    ] = None,
) -> EngineReport:
    """Build a TensorRT engine from an ONNX model; TensorRT-RTX does that without a GPU too."""
    from onelora_compile.exporters import build_engine

    return build_engine(
        model,
        output,
        flavour=flavour.value,
        target=sm or None,
        shapes=parse_sizes(size) if size else None,
        adapters=adapters.value if adapters else None,
        adapter=adapter,
        precision=[one.value for one in precision] if precision else None,
    )


@command("onelora refit model.engine b.safetensors")
def refit(
    engine: Annotated[Path, typer.Argument(help="An engine that was built with --adapters refit.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter (.safetensors).")],
    output: Annotated[Path | None, file_to_write("The engine to write, in place of it.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="The engine's ONNX model, where TensorRT asks for weights.")] = None,
) -> RefitReport:
    """Put another adapter into a finished engine; needs the GPU."""
    from onelora_compile.exporters import refit_engine

    return refit_engine(engine, adapter, output, onnx)


@command("onelora bundle model.onnx -o bundle --jetpack 6.2 --size batch=1,4,8")
def bundle(
    model: Annotated[Path, typer.Argument(help="The ONNX model, of any mode.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    jetpack: Annotated[JetPack, typer.Option(help="Of the device.")] = JetPack.V6_2,
    adapter: Annotated[list[Path] | None, typer.Option(help="An adapter to pack; give it once for each.")] = None,
    size: Sizes = None,
    inputs: Annotated[Path | None, typer.Option(help="Arrays for the self-test, a .npz; random ones without.")] = None,
    swap: Annotated[Swap, typer.Option(help="With refit, vectors of mode input become refittable.")] = Swap.AUTO,
    verify_key: Annotated[
        Path | None, typer.Option(help="A public key (PEM, ed25519): the device takes signed adapters alone.")
    ] = None,
    layout: Annotated[BundleLayout, typer.Option(help="A stock runtime's files too.")] = BundleLayout.PLAIN,
    timing_cache: Annotated[
        list[Path] | None, typer.Option(help="What a device timed (local/engines/timing-….cache); once for each.")
    ] = None,
) -> BundleReport:
    """Write a folder for an NVIDIA Jetson: it builds, tests, runs and updates a model with what JetPack ships."""
    from onelora_compile.exporters import bundle as write_bundle

    return write_bundle(
        model,
        output,
        jetpack=jetpack.value,
        adapters=adapter or (),
        shapes=parse_sizes(size or ()),
        inputs=load_arrays(inputs) if inputs else None,
        swap=swap.value,
        layout=layout.value,
        verify_key=verify_key,
        timing_caches=timing_cache or (),
    )


@command("onelora sign a.safetensors --key key.pem")
def sign(
    adapter: Annotated[Path, typer.Argument(help="The adapter (.safetensors).")],
    key: Annotated[Path, typer.Option(help="The private key (PEM, ed25519).")],
    sequence: Annotated[
        int | None, typer.Option(help="The update's number, larger than any before (default: time in microseconds).")
    ] = None,
) -> Signed:
    """Sign an adapter for devices that take signed ones alone; writes a .sig file beside it."""
    from onelora_compile.cli.reports import Signed
    from onelora_compile.exporters import sign_adapter
    from onelora_compile.exporters.jetson.signing import sequence_of

    signature = sign_adapter(adapter, key, sequence=sequence)
    return Signed(adapter, signature, sequence_of(signature))
