"""ONNX Runtime on the GPU, on the CPU where there is none: each mode computes what PyTorch computes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import onelora_compile as onelora
from gpu.blocks import SMALL
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.testing import fill_vectors, merged_copy

Row = dict[str, Any]


def rows(device: str, small: bool) -> Iterator[Row]:
    import onnxruntime

    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            yield {"what": "ONNX Runtime", "skipped": "this onnxruntime has no CUDAExecutionProvider"}
            return
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), *providers]
    # Whether it is right does not depend on the size.
    for name, block in list(SMALL.items())[: 1 if small else None]:
        model, x = block.build("cpu", torch.float32)
        x = x.detach()
        # The condition of a DiT is one for the whole batch, so a bank can't choose rows of what it feeds.
        linears = [key for key, one in model.named_modules() if isinstance(one, nn.Linear) and key != "adaln"]
        fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_modules=linears)), 0.05)
        merged = merged_copy(model)
        plain, wide = merged(x), merged.double()(x.double())
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "a.safetensors"
            onelora.save_adapter(model, adapter)
            for mode in ("fold", "load", "input", "bank"):
                options: dict[str, Any] = {"bank": [adapter]} if mode == "bank" else {}
                path = Path(folder) / f"{mode}.onnx"
                export_onnx(model, (x,), path, adapters=mode, progress=False, **options)
                runner = OnnxRunner(path, providers=providers)
                got = torch.from_numpy(runner.run([x.numpy()], [0] * len(x) if mode == "bank" else None)[0]).double()
                error = (got - wide).abs().max() / (plain.double() - wide).abs().max()
                yield {"what": "ONNX Runtime", "block": name, "mode": mode, "error_ratio": error.item()}
