"""What the commands `inspect` and `doctor` show."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from onelora_compile.checkpoint import AdapterFile, read_adapter
from onelora_compile.errors import AdapterFileError, require
from onelora_compile.text import bytes_text
from onelora_compile.version import __version__


def inspect_file(path: Path) -> RenderableType:
    """A table of what an adapter file or an ONNX model holds.

    Raises:
        AdapterFileError: neither of the two, or damaged.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
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
    return Group(table, *(line.replace("[", r"\[") for line in lines))


def _onnx_table(path: Path) -> RenderableType:
    ir = require("onnx_ir", "onnx", "inspect an ONNX model")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a damaged file
        raise AdapterFileError(f"{path} is not an ONNX model, or is damaged: {error}") from error
    table = Table(title=f"{path}: ONNX model", show_header=False)
    props = model.metadata_props
    files = {path} | {path.parent / v.const_value.location for v in model.graph.initializers.values() if _external(v)}
    table.add_row("size", bytes_text(sum(file.stat().st_size for file in files if file.is_file())))
    table.add_row("files", ", ".join(sorted(file.name for file in files)))
    table.add_row("opset", ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in model.opset_imports.items()))
    table.add_row("inputs", "\n".join(map(_value_text, model.graph.inputs)))
    table.add_row("outputs", "\n".join(map(_value_text, model.graph.outputs)))
    table.add_row("nodes", str(len(model.graph)))
    table.add_row("adapter", _mode_text(props))
    table.add_row(
        "written by", props.get("onelora.producer") or f"{model.producer_name} {model.producer_version or ''}"
    )
    return table


def _external(value: object) -> bool:
    return hasattr(getattr(value, "const_value", None), "location")


def _value_text(value: object) -> str:
    return f"{value.name}: {value.dtype} {value.shape}".replace("[", r"\[")  # type: ignore[attr-defined]


def _mode_text(props: dict[str, str]) -> str:
    mode = props.get("onelora.mode")
    if mode is None:
        return "none recorded"
    try:
        vectors = json.loads(props.get("onelora.vectors", "{}"))
        count = f"{len(vectors)} vectors"
    except ValueError:
        count = "vectors not readable"
    digest = props.get("onelora.adapter_sha256", "")
    return "none (exported from a base)" if mode == "base" else f"mode {mode!r}, {count}, sha256 {digest[:16]}"


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
        ("tensorrt", "", "builds engines; comes with JetPack or from NVIDIA's package index"),
        ("tensorrt-rtx-cu12-bindings", "tensorrt-rtx", "builds engines for RTX GPUs"),
    ):
        found = _version(name)
        missing = f"optional: pip install 'onelora-compile[{extra}]'" if extra else "optional"
        table.add_row(name, found or "not installed", use if found else f"{missing} ({use})".replace("[", r"\["))
    return table


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
