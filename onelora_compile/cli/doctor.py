"""What `onelora doctor` finds on this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

import torch

from onelora_compile.errors import MissingExtraError
from onelora_compile.printable import Printable
from onelora_compile.table import Table
from onelora_compile.version import __version__


@dataclasses.dataclass(frozen=True)
class MachinePart:
    """One part of the machine.

    Attributes:
        name: of the part.
        found: its version or name; None if it is missing.
        meaning: for what a user can do.
    """

    name: str
    found: str | None
    meaning: str


@dataclasses.dataclass(frozen=True)
class Checkup(Printable):
    """Versions and devices, with what each means."""

    version: str
    parts: list[MachinePart]

    def __rich__(self) -> Table:
        table = Table("part", "found", "what it means", title=f"onelora-compile {self.version}")
        for part in self.parts:
            table.add_row(part.name, part.found or "missing", part.meaning)
        return table


def examine() -> Checkup:
    """Look at what is installed and which devices there are."""
    return Checkup(__version__, [*_needed(), *_optional(), *map(_tensorrt, ("tensorrt", "rtx"))])


def _needed() -> Iterator[MachinePart]:
    yield MachinePart("Python", platform.python_version(), platform.platform())
    yield MachinePart("torch", str(torch.__version__), "2.11 or newer is needed")
    if "onelora" in torch.compiler.list_backends():
        yield MachinePart('backend "onelora"', "registered", "torch.compile finds it")
    else:
        yield MachinePart('backend "onelora"', None, "install the package with pip: a source tree alone is not enough")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    can = "Inductor can compile for the CPU" if compiler else "on a CPU use options={'inner': 'aot_eager'}"
    yield MachinePart("C++ compiler", compiler, can)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    yield MachinePart("CUDA GPU", gpu, "Inductor compiles for it" if gpu else "training and export run on the CPU")


def _optional() -> Iterator[MachinePart]:
    for name, extra, use in (
        ("triton", "", "runs the fused kernel on a CUDA GPU; comes with CUDA builds of torch"),
        ("onnxruntime", "onnx", "runs and verifies exported models"),
        ("onnxscript", "onnx", "exports to ONNX"),
        ("transformers", "hf", "its models and Conv1D are known"),
        ("peft", "hf", "compared with in the demo"),
    ):
        found = _version(name)
        missing = f"optional: pip install 'onelora-compile[{extra}]'" if extra else "optional"
        yield MachinePart(name, found, use if found else f"{missing} ({use})")


def _tensorrt(flavour: str) -> MachinePart:
    """What is found of a TensorRT, and what it can."""
    from onelora_compile.exporters.tensorrt.library import find_api

    title = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}[flavour]
    try:
        api = find_api(flavour)
    except MissingExtraError as error:
        return MachinePart(title, None, f"optional. {error}")
    targets = ", ".join(api.capabilities)
    can = [f"builds engines for {targets}, also without a GPU" if targets else "builds engines for the GPU at hand"]
    typed = api.flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") is not None
    can.append("dtypes as in the ONNX model" if typed else "float32 unless precision= allows less")
    can.append("single vectors refittable" if api.flag("BuilderFlag", "REFIT_INDIVIDUAL") is not None else "no refit")
    return MachinePart(title, api.version, "; ".join(can))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
