"""Serving adapters: swapped in a compiled model, row by row in an ONNX session, folded into a file and an engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import onelora_compile as onelora
from onelora_compile.adapting.adapter import unwrap
from onelora_compile.errors import MissingExtraError, require
from onelora_compile.examples.recipes import accuracy
from onelora_compile.examples.sentences.results import BankResult, EngineResult, FoldedFile, SwapResult
from onelora_compile.examples.sentences.train import Encoded, predict, trimmed
from onelora_compile.exporters import OnnxRunner, build_engine, export_onnx

AXES = {"tokens": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
GPUS = ("sm_80", "sm_86", "sm_89", "sm_120")  # Ampere to Blackwell: the build is the same for one or four


def swap(model: nn.Module, base: nn.Module, files: Sequence[Path], data: Encoded, rounds: int) -> SwapResult:
    """Load the adapters in turns into the compiled model and run it after each load.

    Args:
        model: compiled and adapted.
        base: the pretrained model, never adapted.
        files: the adapters.
        data: sentences to run it on.
        rounds: how often each adapter is loaded.
    """
    tokens, mask, _ = trimmed(tuple(one[:8] for one in data))
    times: list[float] = []
    with torch.no_grad():
        model(tokens, mask)  # inference without gradients is a graph of its own, made here
        before = counters["stats"]["unique_graphs"]
        for _ in range(rounds):
            for file in files:
                start = time.perf_counter()
                onelora.load_adapter(model, file)
                times.append((time.perf_counter() - start) * 1e3)
                model(tokens, mask)
        recompiled = counters["stats"]["unique_graphs"] - before
        inner: Any = unwrap(model)
        with onelora.disabled(model):
            same = torch.equal(inner(tokens, mask), base(tokens, mask))
    return SwapResult(len(times), statistics.median(times), recompiled, same)


def bank(model: nn.Module, files: Mapping[str, Path], data: Mapping[str, Encoded], path: Path, rows: int) -> BankResult:
    """Export all adapters as one file, and answer one batch of it in which each row has a task of its own.

    Args:
        model: adapted, not compiled; another adapter is loaded into it meanwhile.
        files: the adapter of each task.
        data: the sentences of each task.
        path: the file to write.
        rows: sentences of each task in the batch.
    """
    example = trimmed(tuple(one[:2] for one in next(iter(data.values()))))[:2]
    report = export_onnx(
        model, example, path, adapters="bank", bank=list(files.values()), dynamic_shapes=AXES, progress=False
    )
    number = {name: place for place, name in enumerate(files)}
    ids = [number[name] for _ in range(rows) for name in files]  # films, products, news, films, ...
    tokens, mask = (torch.stack([data[name][part][i] for i in range(rows) for name in files]) for part in (0, 1))
    (logits,) = OnnxRunner(path).run([tokens.numpy(), mask.numpy()], adapter_ids=ids)
    expected = torch.empty(len(ids), 2)
    for name, file in files.items():
        onelora.load_adapter(model, file)
        chosen = torch.tensor(ids) == number[name]
        with torch.no_grad():
            expected[chosen] = model(tokens[chosen], mask[chosen])
    other = int((torch.from_numpy(logits).argmax(1) != expected.argmax(1)).sum())
    return BankResult(len(ids), other, float(np.abs(logits - expected.numpy()).max()), report.bytes)


def fold(model: nn.Module, base: nn.Module, data: Encoded, path: Path) -> FoldedFile:
    """Export with the vectors folded, and answer all sentences in ONNX Runtime.

    Args:
        model: adapted, not compiled.
        base: never adapted.
        data: the test sentences.
        path: the file to write.
    """
    onnx = require("onnx", "demo", "read the exported model")
    example = trimmed(tuple(one[:2] for one in data))[:2]
    plain = path.with_name(f".{path.name}.base")
    try:
        export_onnx(base, example, plain, dynamic_shapes=AXES, verify=False, progress=False)
        base_nodes = len(onnx.load(plain).graph.node)
    finally:
        plain.unlink(missing_ok=True)
    report = export_onnx(model, example, path, adapters="fold", dynamic_shapes=AXES, progress=False)
    runner = OnnxRunner(path)

    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(runner.run([tokens.numpy(), mask.numpy()])[0])

    logits, eager = predict(run, data), predict(model, data)
    return FoldedFile(
        bytes=report.bytes,
        nodes=len(onnx.load(path).graph.node),
        base_nodes=base_nodes,
        accuracy=accuracy(logits, data[2]),
        difference=(logits - eager).abs().max().item(),
    )


def engine(path: Path, out: Path) -> EngineResult:
    """Build an engine of an ONNX file with TensorRT-RTX, if that is installed."""
    shapes = {"batch": (1, 8, 64), "length": (2, 32, 128)}
    try:
        report = build_engine(path, out, target=GPUS, shapes=shapes, flavour="rtx", progress=False)
    except MissingExtraError as error:
        return EngineResult("", str(error), (), 0, 0.0)
    return EngineResult(
        built_by=f"TensorRT-RTX {report.manifest.version}",
        why_not="",
        targets=report.manifest.targets,
        bytes=report.bytes,
        seconds=report.parse_seconds + report.build_seconds,
    )
