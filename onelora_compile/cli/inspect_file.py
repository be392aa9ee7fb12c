"""What the commands `inspect` and `doctor` show."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from onelora_compile.errors import MissingExtraError
from onelora_compile.printable import bytes_text
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter

if TYPE_CHECKING:
    from onelora_compile.exporters.onnx_file.metadata import Metadata


def inspect_file(path: Path) -> RenderableType:
    """A table of what an adapter file, an ONNX model or an engine holds.

    Raises:
        AdapterFileError: no adapter file, or damaged.
        ExportError: no ONNX model or manifest of an engine, or damaged, or of another engine.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.with_name(f"{path.name}.json").is_file() or path.suffix in (".engine", ".plan", ".trt"):
        return _engine_table(path)
    return _onnx_table(path) if path.suffix == ".onnx" else _adapter_table(path, read_adapter(path))


def _adapter_table(path: Path, file: AdapterFile) -> RenderableType:
    table = Table(title=f"{path}: 1LoRA adapter, {bytes_text(path.stat().st_size)}, by {file.producer}")
    for column in ("module", "vector", "base weight", "base dtype", "norm of b 1ᵀ / norm of W"):
        table.add_column(column)
    for name, vector in file.vectors.items():
        base = file.fingerprints[name]
        update = float(vector.double().norm()) * base.shape[1] ** 0.5  # Frobenius norm of b 1ᵀ
        ratio = f"{update / base.norm:.2e}" if base.norm else "-"
        table.add_row(name, str(list(vector.shape)), str(list(base.shape)), base.dtype, ratio)
    entries = sum(vector.numel() for vector in file.vectors.values())
    lines = [f"{len(file.vectors)} vectors, {entries:,} numbers"]
    lines += [f"also trained: {name} {list(tensor.shape)}" for name, tensor in file.saved.items()]
    lines.append(f"config: {file.config.to_json()}")
    return Group(table, *(line for line in lines))


def _onnx_table(path: Path) -> RenderableType:
    from onelora_compile.exporters.onnx_file.load import load_model
    from onelora_compile.exporters.onnx_file.metadata import Metadata

    model = load_model(path)
    metadata = Metadata.from_props(model.metadata_props, str(path))
    table = Table(title=f"{path}: ONNX model", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    held: list[Any] = [value.const_value for value in model.graph.initializers.values()]
    files = {path} | {path.parent / str(tensor.location) for tensor in held if hasattr(tensor, "location")}
    table.add_row("size", bytes_text(sum(file.stat().st_size for file in files if file.is_file())))
    table.add_row("files", ", ".join(sorted(file.name for file in files)))
    table.add_row("opset", ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in model.opset_imports.items()))
    table.add_row("inputs", "\n".join(_value_text(v) for v in model.graph.inputs if v.name not in metadata.vectors))
    table.add_row("outputs", "\n".join(map(_value_text, model.graph.outputs)))
    table.add_row("nodes", str(len(model.graph)))
    table.add_row("adapter", _mode_text(metadata, recorded="onelora.mode" in model.metadata_props))
    if metadata.adapters:
        numbered = enumerate(metadata.adapters) if metadata.mode == "bank" else (("", a) for a in metadata.adapters)
        table.add_row("adapters", "\n".join(f"{number} {name}".strip() for number, name in numbered))
    tool = f"{model.producer_name or 'unknown'} {model.producer_version or ''}"
    table.add_row("written by", metadata.producer or tool)
    return Group(table, _vectors_table(metadata)) if metadata.vectors else table


def _engine_table(path: Path) -> RenderableType:
    from onelora_compile.exporters.tensorrt.library import TITLES
    from onelora_compile.exporters.tensorrt.manifest import Manifest

    manifest = Manifest.read(path)
    manifest.check_file(path)
    table = Table(title=f"{path}: engine of {TITLES.get(manifest.flavour, '')} {manifest.version}", show_header=False)
    table.add_row("size", bytes_text(path.stat().st_size))
    table.add_row("for", f"{', '.join(manifest.targets) or 'the default devices'}, {manifest.system} {manifest.l4t}")
    table.add_row("computes in", manifest.precision)
    table.add_row("from", f"{manifest.onnx}, sha256 {manifest.onnx_sha256[:16]}")
    adapter = manifest.adapter or ", ".join(manifest.adapters)
    digest = f", sha256 {manifest.adapter_sha256[:16]}" if manifest.adapter_sha256 else ""
    table.add_row(
        "adapters", f"mode {manifest.mode!r}, {len(manifest.vectors)} vectors, {adapter or 'unnamed'}{digest}"
    )
    given = [one for one in manifest.inputs if one.name not in manifest.vectors]
    table.add_row("inputs", "\n".join(f"{one.name}: {one.dtype} {list(one.shape)}" for one in given))
    outputs = "\n".join(f"{one.name}: {one.dtype} {list(one.shape)}" for one in manifest.outputs)
    table.add_row("outputs", outputs)
    for number, profile in enumerate(manifest.profiles):
        lines = [f"{name} {' | '.join(str(list(shape)) for shape in shapes)}" for name, shapes in profile.items()]
        table.add_row(f"profile {number}", "\n".join(lines))
    if manifest.flags:
        table.add_row("options", ", ".join(f"{name} {value}" for name, value in manifest.flags.items()))
    table.add_row("written by", manifest.producer)
    return table


def _value_text(value: object) -> str:
    return f"{value.name}: {value.dtype} {value.shape}"  # type: ignore[attr-defined]


def _mode_text(metadata: Metadata, recorded: bool) -> str:
    if not recorded:
        return "none recorded"
    if metadata.mode == "base":
        return "none (exported from a base)"
    return f"mode {metadata.mode!r}, {len(metadata.vectors)} vectors, sha256 {metadata.sha256[:16]}"


def _vectors_table(metadata: Metadata) -> Table:
    table = Table(title="vectors, and the base weights that they belong to")
    for column in ("vector", "shape", "base weight", "base dtype", "norm of W"):
        table.add_column(column, overflow="fold")
    for name, shape in metadata.vectors.items():
        base = metadata.fingerprints.get(name)
        about = (str(list(base.shape)), base.dtype, f"{base.norm:.4g}") if base is not None else ("-", "-", "-")
        table.add_row(name, str(list(shape)), *about)
    return table


def doctor_table() -> Table:
    """Versions and devices, with what each means."""
    table = Table(title=f"onelora-compile {__version__}")
    for column in ("part", "found", "what it means"):
        table.add_column(column)
    table.add_row("Python", platform.python_version(), platform.platform())
    table.add_row("torch", torch.__version__, "2.11 or newer is needed")
    backends = torch.compiler.list_backends()
    registered = "onelora" in backends
    table.add_row(
        'backend "onelora"',
        "registered" if registered else "missing",
        "torch.compile finds it" if registered else "install the package with pip: a source tree alone is not enough",
    )
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    table.add_row(
        "C++ compiler",
        compiler or "missing",
        "Inductor can compile for the CPU" if compiler else "on a CPU use options={'inner': 'aot_eager'}",
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    table.add_row(
        "CUDA GPU", gpu or "none", "Inductor compiles for it" if gpu else "training and export run on the CPU"
    )
    for name, extra, use in (
        ("triton", "", "the fused kernel is a candidate on a CUDA GPU; comes with CUDA builds of torch"),
        ("onnxruntime", "onnx", "runs and verifies exported models"),
        ("onnxscript", "onnx", "exports to ONNX"),
        ("transformers", "hf", "its models and Conv1D are known"),
        ("peft", "hf", "compared with in the demo"),
    ):
        found = _version(name)
        missing = f"optional: pip install 'onelora-compile[{extra}]'" if extra else "optional"
        table.add_row(name, found or "not installed", use if found else f"{missing} ({use})")
    for flavour, title in (("tensorrt", "TensorRT"), ("rtx", "TensorRT-RTX")):
        table.add_row(title, *_tensorrt(flavour))
    return table


def _tensorrt(flavour: str) -> tuple[str, str]:
    """What is found of a TensorRT, and what it can."""
    from onelora_compile.exporters.tensorrt.library import find_api

    try:
        api = find_api(flavour)
    except MissingExtraError as error:
        return "not installed", f"optional. {error}"
    targets = ", ".join(api.capabilities)
    can = [f"builds engines for {targets}, also without a GPU" if targets else "builds engines for the GPU at hand"]
    typed = api.flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") is not None
    can.append("dtypes as in the ONNX model" if typed else "float32 unless precision= allows less")
    can.append("single vectors refittable" if api.flag("BuilderFlag", "REFIT_INDIVIDUAL") is not None else "no refit")
    return api.version, "; ".join(can)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
