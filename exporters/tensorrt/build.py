"""Build a TensorRT engine from an ONNX model."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from onelora_compile.errors import ExportError, require
from onelora_compile.exporters.faults.rewrite import rewrite_for
from onelora_compile.exporters.jetson.device.core.build import Build
from onelora_compile.exporters.jetson.device.core.modes import FOLD
from onelora_compile.exporters.onnx_file.save import data_files
from onelora_compile.exporters.onnx_runtime.convert_adapter import adapter_of
from onelora_compile.exporters.tensorrt.library import Api, find_api
from onelora_compile.exporters.tensorrt.manifest import EngineTensor, Manifest, l4t_release, system
from onelora_compile.exporters.tensorrt.messages import in_our_words
from onelora_compile.exporters.tensorrt.network import check_inputs, dims_of
from onelora_compile.exporters.tensorrt.options import (
    check_refit,
    check_targets,
    named_targets,
    set_options,
    target_here,
    timing_cache_of,
)
from onelora_compile.exporters.tensorrt.precision import Typing, holds_half, precision_notes, precision_text, typing_of
from onelora_compile.exporters.tensorrt.profiles import profiles_of
from onelora_compile.exporters.tensorrt.vectors import Prepared, prepared
from onelora_compile.exporters.tensorrt.write_engine import refuse_overwriting_engine, write_engine
from onelora_compile.file_names import as_file, as_path
from onelora_compile.printable import Printable, bytes_text, shortened
from onelora_compile.progress import counting
from onelora_compile.table import Table
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.atomic_write import (
    check_writable,
    refuse_overwriting,
)
from onelora_compile.weights.file_kinds import refuse_other_kinds
from onelora_compile.weights.merge import FoldLoss

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class EngineReport(Printable):
    """What `build_engine` built.

    Attributes:
        files: the engine, its manifest, and the vectors it starts with where it has any to swap.
        bytes: of the engine.
        manifest: what it was built from and for.
        losses: what rounding lost of vectors that went into weights on the way, by name.
        notes: what the user should know, and what was rewritten for this TensorRT.
        warnings: of NVIDIA's libraries.
        parse_seconds: wall time of reading the model.
        build_seconds: wall time of the builder.
    """

    files: list[Path]
    bytes: int
    manifest: Manifest
    losses: dict[str, FoldLoss]
    notes: list[str]
    warnings: list[str]
    parse_seconds: float
    build_seconds: float

    def __rich__(self) -> Table:
        one = self.manifest
        table = Table(title=f"built {self.files[0]}", show_header=False)
        table.add_row("files", "\n".join(str(file) for file in self.files))
        table.add_row("size", bytes_text(self.bytes))
        table.add_row("built by", f"{'TensorRT-RTX' if one.flavour == 'rtx' else 'TensorRT'} {one.version}")
        table.add_row("for", ", ".join(one.targets) or "the library's default devices")
        table.add_row("computes in", one.precision)
        adapter = f", adapter {one.adapter}" if one.adapter else ""
        table.add_row("adapters", f"mode {one.mode!r}, {len(one.vectors)} vectors{adapter}")
        if self.losses:
            worst = max(self.losses.values(), key=lambda loss: loss.relative)
            still = max(loss.unchanged for loss in self.losses.values())
            table.add_row(
                "lost to rounding",
                f"at most {worst.relative:.1e} of an update; at most {still:.1%} of a weight's entries did not move",
            )
        for number, profile in enumerate(one.profiles):
            lines = [f"{name} {' | '.join(str(list(shape)) for shape in shapes)}" for name, shapes in profile.items()]
            table.add_row(f"profile {number}", "\n".join(lines))
        if one.flags:
            table.add_row("options", ", ".join(f"{name} {value}" for name, value in one.flags.items()))
        for note in self.notes:
            table.add_row("note", Text(note))
        if self.warnings:
            table.add_row("NVIDIA warns", Text(shortened(self.warnings, 3)))
        table.add_row("time", f"read {self.parse_seconds:.1f} s, build {self.build_seconds:.1f} s")
        return table


def build_engine(
    onnx: PathLike,
    engine: PathLike,
    *,
    flavour: str = "auto",
    target: str | Sequence[str] | None = None,
    shapes: Any = None,
    adapters: str | None = None,
    adapter: PathLike | AdapterFile | None = None,
    calibration: Any = None,
    on_saturation: str = "error",
    precision: str | Sequence[str] | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    timing_cache: PathLike | None = None,
    dla_core: int | None = None,
    progress: bool = True,
) -> EngineReport:
    """Build an engine from an ONNX model of `export_onnx`, `fold_onnx` or another tool.

    If it fails, nothing was written, and an old engine is as it was.

    Args:
        onnx: the model; external weights are read from beside it.
        engine: the file to write, replaced in one step; its manifest goes beside it, to `<engine>.json`.
        flavour: "tensorrt" (8.5 to 11; builds for the GPU at hand), "rtx" (TensorRT for RTX GPUs; builds on any x86-64
            machine, without a GPU too), or "auto": the one that is installed.
        target: the GPU to build for, "sm_86", or several; only TensorRT-RTX builds for others than the one at hand.
            None is the GPU at hand, for TensorRT-RTX its own default.
        shapes: sizes of dynamic inputs: {"input": (smallest, usual, largest)}, or of a dimension {"batch": (1, 8, 32)};
            a list of such makes several profiles.
        adapters: where the vectors are.
            "fold": in the weights, at no cost. From models of mode "fold" and "load", or any base with `adapter`.
            "input": inputs of the engine, swapped at no cost before any call. From models of mode "input".
            "bank": tables, chosen for each row by the input `adapter_ids`. From models of mode "bank".
            "refit": weights that `refit_engine` replaces in the finished engine. From models of mode "input"; needs
            TensorRT 10.2 or newer, and the GPU.
            None is the first of these that the model allows.
        adapter: adapter file to build with, in the place of the vectors that the model was exported with.
        calibration: inputs for an adapter of a base with quantised activations, see `fold_onnx`.
        on_saturation: "error" or "allow", see `fold_onnx`.
        precision: None computes in the dtypes of the model. "fp16", "bf16", "int8" or several allow TensorRT 8 to 10 to
            choose these for layers of a model in float32 (weak typing).
        workspace: bytes that a layer may use; None is all of the GPU's memory.
        optimization_level: 0 (fastest build) to 5; None is the library's, 3.
        timing_cache: a file that makes later builds faster; it is updated. TensorRT-RTX has none.
        dla_core: the deep learning accelerator of a Jetson to build for; what it can't do runs on the GPU.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ConfigError: options that this TensorRT, model or device can't take; the message says why and what to do.
        ExportError: the parser or the builder refused the model; with NVIDIA's messages.
        AdapterFileError, BaseMismatchError, StateError: the adapter does not belong to the model.
        MissingExtraError: no TensorRT is installed.
        OSError: a file can't be read or written.
    """
    onnx, engine = as_path(onnx, "onnx"), as_file(engine, "engine")
    check_writable(engine)  # now, not after minutes of building
    read = [onnx, adapter, *data_files(onnx)]
    refuse_overwriting_engine(engine, [*read, timing_cache])
    if timing_cache is not None:
        timing_cache = as_file(timing_cache, "timing_cache")
        refuse_overwriting(timing_cache, [one for one in read if isinstance(one, str | os.PathLike)], "timing_cache")
        refuse_other_kinds(timing_cache, "", "timing_cache")
    targets = named_targets(target)
    api = find_api(flavour, cross=bool(targets))
    check_targets(api, targets)
    api.messages.clear()
    start, title = time.perf_counter(), f"build {engine.name}"
    ranges = {"calibration": calibration, "on_saturation": on_saturation}
    with prepared(onnx, adapters, adapter, engine.parent, progress, ranges) as model:
        if model.traits.refits:
            check_refit(api)
        typing = typing_of(api, model.model, precision)
        model, rewritten = _rewritten(api, model, typing)
        with in_our_words(onnx, api, refit=model.traits.refits):
            build = Build(api.trt, api.logger, typing.strong)
            build.parse(str(model.path), model.content())
            network = build.network
            check_inputs(network, model, onnx)
            profiles = profiles_of(dims_of(model.model, network), shapes)
            build.targets([one.replace("sm_", "SM") for one in targets])
            flags = set_options(api, build, workspace, optimization_level, dla_core)
            build.allow(typing.flags)
            for profile in profiles:
                build.profile(profile)
            if model.traits.refits and (refused := build.refittable(list(model.vectors))):
                what = f"{api.title} can't make the vectors {shortened(refused)} refittable"
                raise ExportError(f"{what}; use adapters='input'")
            parsed = time.perf_counter()
            with timing_cache_of(api, build, timing_cache) as (recorded, notes), counting(title, progress) as bar:
                plan = build.plan(bar)
            built = time.perf_counter()
        tf32 = bool(build.config.get_flag(api.trt.BuilderFlag.TF32))
        notes += [*rewritten, *precision_notes(model.model, typing)]
        initial = _initial(model, adapter, onnx)
        manifest = dataclasses.replace(
            _manifest(api, model, onnx, adapter),
            targets=targets or target_here(api),
            inputs=_tensors(network.num_inputs, network.get_input),
            outputs=_tensors(network.num_outputs, network.get_output),
            profiles=tuple(profiles),
            precision=precision_text(network, typing, tf32),
            flags=flags | recorded | ({"precision": list(typing.flags)} if typing.flags else {}),
            initial=f"{engine.name}.safetensors" if initial is not None else "",
        )
    files, manifest = write_engine(engine, plan, manifest, initial)
    return EngineReport(
        files=files,
        bytes=engine.stat().st_size,
        manifest=manifest,
        losses=model.losses,
        notes=notes,
        warnings=list(dict.fromkeys(api.messages.warnings)),
        parse_seconds=parsed - start,
        build_seconds=built - parsed,
    )


def _rewritten(api: Api, model: Prepared, typing: Typing) -> tuple[Prepared, list[str]]:
    """The model without the graphs that this TensorRT is known to compute wrong, and what was done."""
    if api.flavour != "tensorrt":  # of TensorRT-RTX, whose versions are others, no such graph is known
        return model, []
    if model.model.functions:
        require("onnx_ir.passes.common", "onnx", "build an engine").InlinePass()(model.model)
    half = bool(typing.flags) or holds_half(model.model)
    found = rewrite_for(model.model, api.version, half, weak=half and not typing.strong)
    return dataclasses.replace(model, changed=model.changed or found.changed), found.notes


def _manifest(api: Api, model: Prepared, onnx: Path, adapter: Any) -> Manifest:
    """What is known before the network is."""
    return Manifest(
        flavour=api.flavour,
        version=api.version,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        system=system(),
        l4t=l4t_release(),
        onnx=onnx.name,
        onnx_sha256=model.sha256,
        mode=model.mode,
        adapter=_adapter_name(model, adapter),
        adapter_sha256=model.metadata.sha256,
        adapters=model.metadata.adapters if model.traits.feeds_ids else (),
        vectors=model.metadata.vectors,
        fingerprints=model.metadata.fingerprints,
        trained=model.metadata.trained,
        constant=model.metadata.constant,
        digests=model.metadata.digests if model.traits.feeds_ids else (),
    )


def _tensors(count: int, get: Any) -> tuple[EngineTensor, ...]:
    return tuple(EngineTensor(one.name, one.dtype.name, tuple(one.shape)) for one in map(get, range(count)))


def _adapter_name(model: Prepared, adapter: Any) -> str:
    if isinstance(adapter, str | os.PathLike):
        return Path(adapter).name.removesuffix(".safetensors")
    return model.metadata.adapters[0] if model.traits is FOLD and model.metadata.adapters else ""


def _initial(model: Prepared, adapter: Any, onnx: Path) -> AdapterFile | None:
    """The vectors that the engine starts with, as an adapter file."""
    if not model.vectors:
        return None
    file = read_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    config = file.config if file is not None else None
    return adapter_of(model.metadata, model.vectors, f"from {onnx.name}", config)
