"""TensorRT engines: built, run, swapped and refitted here, against ONNX Runtime; and what a call costs by mode."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onelora_compile as onelora
from gpu.blocks import BLOCKS, SMALL
from onelora_compile.exporters import EngineRunner, OnnxRunner, build_engine, export_onnx
from onelora_compile.report.timing import interleaved, ratios
from onelora_compile.testing import fill_vectors

BASE = "base"
WAYS = {BASE: "fold", "fold": "fold", "load": "load", "input": "input", "refit": "input", "bank": "bank"}
Row = dict[str, Any]


def rows(device: str, small: bool) -> Iterator[Row]:
    assert device == "cuda"
    for name in ("ViT-L", "Llama-7B"):
        with tempfile.TemporaryDirectory() as folder:
            yield from _of_block(name, (SMALL if small else BLOCKS)[name], Path(folder))


def _of_block(name: str, block: Any, folder: Path) -> Iterator[Row]:
    base, x = block.build("cpu", torch.float16)
    x = x.detach()
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    quiet: dict[str, Any] = {"verify": False, "progress": False}
    export_onnx(base, (x,), folder / "base.onnx", **quiet)
    adapted = onelora.adapt(base)
    for seed, file in enumerate(files):
        onelora.save_adapter(fill_vectors(adapted, 0.01, seed), file)
    onelora.load_adapter(adapted, files[0])
    for mode in ("fold", "load", "input"):
        export_onnx(adapted, (x,), folder / f"{mode}.onnx", adapters=mode, **quiet)
    export_onnx(adapted, (x,), folder / "bank.onnx", adapters="bank", bank=files, **quiet)
    engines = {}
    for way, mode in WAYS.items():
        source = folder / ("base.onnx" if way == BASE else f"{mode}.onnx")
        start = time.perf_counter()
        build_engine(
            source,
            folder / f"{way}.engine",
            adapters=way if way in ("input", "refit", "bank") else None,
            progress=False,
        )
        engines[way] = EngineRunner(folder / f"{way}.engine")
        row: Row = {"block": name, "what": "engine", "way": way, "build_seconds": time.perf_counter() - start}
        yield row | {"error_ratio": _error(engines[way], source, way, x, files)}
    feed = [x.cuda()]
    times = interleaved({way: functools.partial(_call, engine, feed) for way, engine in engines.items()}, 15)
    for way, (median, low, high) in ratios(times, BASE).items():
        milliseconds = 1e3 * float(np.median(times[way]))
        yield {
            "block": name,
            "what": "engine call",
            "way": way,
            "milliseconds": milliseconds,
            "ratio": median,
            "ratio_p20": low,
            "ratio_p80": high,
        }


def _call(engine: EngineRunner, feed: list[Any]) -> None:
    engine.run(feed)


def _error(engine: EngineRunner, source: Path, way: str, x: torch.Tensor, files: list[Path]) -> float:
    """The largest difference to ONNX Runtime over the largest output, after swaps there and back."""
    reference, worst = OnnxRunner(source), 0.0
    for adapter in (None, files[1], None) if way in ("input", "refit") else (None,):
        if way in ("input", "refit"):
            engine.use(adapter)
            reference.use(adapter)
        ids = [0] * len(x) if way == "bank" else None
        got, expected = (one.run([x.numpy()], ids)[0].astype(np.float32) for one in (engine, reference))
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    return worst
