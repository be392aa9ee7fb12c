"""Shipping the adapter: folded into an ONNX file and a TensorRT engine, and swapped in a compiled model."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters

import onelora_compile as onelora
from onelora_compile.adapting.adapter import unwrap
from onelora_compile.errors import MissingExtraError, require
from onelora_compile.examples.digits.data import Domain
from onelora_compile.examples.digits.train import accuracy, predict
from onelora_compile.exporters import build_engine, export_onnx
from onelora_compile.exporters.tensorrt.plan_text import kernels


@dataclasses.dataclass(frozen=True)
class OnnxResult:
    """The folded ONNX file on the held-out images of its domain.

    Attributes:
        bytes: of the file.
        base_bytes: of the base exported without an adapter.
        nodes: of its graph.
        base_nodes: of the base's graph.
        eager_accuracy: of the adapted model in PyTorch.
        accuracy: of the file in ONNX Runtime.
        difference: the largest between the logits of the two.
        largest_logit: in magnitude, to judge the difference by.
        export_seconds: of exporting and verifying.
    """

    bytes: int
    base_bytes: int
    nodes: int
    base_nodes: int
    eager_accuracy: float
    accuracy: float
    difference: float
    largest_logit: float
    export_seconds: float


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """The engine of the folded ONNX file, built without a GPU and not run.

    Attributes:
        built_by: product and version; "" where none is installed.
        why_not: why there is no engine, "" where there is one.
        targets: the GPUs that it is for.
        bytes: of the file.
        build_seconds: of reading the model and building.
        kernels: that its plan launches.
        base_kernels: the same of the base's.
    """

    built_by: str
    why_not: str
    targets: tuple[str, ...]
    bytes: int
    build_seconds: float
    kernels: int
    base_kernels: int


@dataclasses.dataclass(frozen=True)
class SwapResult:
    """Two adapters, loaded in turns into one compiled model.

    Attributes:
        loads: how many files were loaded.
        milliseconds: median of one load: read, check against the base, copy.
        recompiled: graphs that Dynamo made meanwhile; 0 is the promise.
        accuracies: of each adapter on its own domain, through the compiled model.
        crossed: of each adapter on the other domain.
        disabled_is_base: whether the disabled model gives the very logits of the base, both in eager.
        disabled_difference: the largest between the disabled model, compiled, and the base in eager.
    """

    loads: int
    milliseconds: float
    recompiled: int
    accuracies: dict[str, float]
    crossed: dict[str, float]
    disabled_is_base: bool
    disabled_difference: float


def deploy_onnx(model: nn.Module, base: nn.Module, path: Path, domain: Domain) -> OnnxResult:
    """Export with the vectors folded and a dynamic batch, then run all held-out images at once."""
    runtime = require("onnxruntime", "demo", "run the exported model")
    onnx = require("onnx", "demo", "read the exported model")
    images = domain.test_images
    shapes = {"images": {0: "batch"}}
    report = export_onnx(model, (images[:2],), path, adapters="fold", dynamic_shapes=shapes, progress=False)
    plain = path.with_name(f".{path.name}.base")
    try:
        base_bytes = export_onnx(base, (images[:2],), plain, dynamic_shapes=shapes, verify=False, progress=False).bytes
        base_nodes = len(onnx.load(plain).graph.node)
    finally:
        plain.unlink(missing_ok=True)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        eager = unwrap(model)(images)
    return OnnxResult(
        bytes=report.bytes,
        base_bytes=base_bytes,
        nodes=len(onnx.load(path).graph.node),
        base_nodes=base_nodes,
        eager_accuracy=accuracy(eager, domain.test_labels),
        accuracy=accuracy(torch.from_numpy(logits), domain.test_labels),
        difference=float(np.abs(logits - eager.numpy()).max()),
        largest_logit=eager.abs().max().item(),
        export_seconds=report.seconds,
    )


GPUS = ("sm_80", "sm_86", "sm_89", "sm_120")  # Ampere to Blackwell: the build is the same for one or four


def deploy_engine(path: Path, base: nn.Module, engine: Path, domain: Domain) -> EngineResult:
    """Build engines of the folded ONNX file and of the base with TensorRT-RTX, if that is installed."""
    options = {"target": GPUS, "shapes": {"batch": (1, 32, 512)}, "flavour": "rtx", "progress": False}
    try:
        report = build_engine(path, engine, **options)  # type: ignore[arg-type]
    except MissingExtraError as error:
        return EngineResult("", str(error), (), 0, 0.0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "base.onnx"
        shapes = {"images": {0: "batch"}}
        export_onnx(base, (domain.test_images[:2],), plain, dynamic_shapes=shapes, verify=False, progress=False)
        other = plain.with_suffix(".engine")
        build_engine(plain, other, **options)  # type: ignore[arg-type]
        base_kernels = len(kernels(other.read_bytes()))
    return EngineResult(
        built_by=f"TensorRT-RTX {report.manifest.version}",
        why_not="",
        targets=report.manifest.targets,
        bytes=report.bytes,
        build_seconds=report.parse_seconds + report.build_seconds,
        kernels=len(kernels(engine.read_bytes())),
        base_kernels=base_kernels,
    )


def swap(model: nn.Module, base: nn.Module, files: list[Path], domains: list[Domain], rounds: int) -> SwapResult:
    """Load the adapters in turns into the compiled model and run it after each load.

    Args:
        model: compiled and adapted.
        base: the pretrained model, never adapted.
        files: one adapter per domain.
        domains: where each belongs.
        rounds: how often each adapter is loaded.
    """
    predict(model, domains[0].test_images)  # inference without gradients is a graph of its own, made here
    before = counters["stats"]["unique_graphs"]
    times, accuracies, crossed = [], {}, {}
    for _ in range(rounds):
        for file, own, other in zip(files, domains, domains[::-1], strict=True):
            start = time.perf_counter()
            onelora.load_adapter(model, file)
            times.append((time.perf_counter() - start) * 1e3)
            accuracies[own.name] = accuracy(predict(model, own.test_images), own.test_labels)
            crossed[own.name] = accuracy(predict(model, other.test_images), other.test_labels)
    images = domains[0].test_images
    expected = predict(base, images)
    with onelora.disabled(model):
        same = torch.equal(predict(unwrap(model), images), expected)
        difference = (predict(model, images) - expected).abs().max().item()
    recompiled = counters["stats"]["unique_graphs"] - before
    return SwapResult(len(times), statistics.median(times), recompiled, accuracies, crossed, same, difference)
