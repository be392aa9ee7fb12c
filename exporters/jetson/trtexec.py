"""The command line of `trtexec` that builds what a bundle builds, with the flags of that TensorRT."""

from __future__ import annotations

import shlex
from typing import Any

from onelora_compile.exporters.jetson.device.core.modes import MODES
from onelora_compile.exporters.jetson.device.ort_providers import shapes_text
from onelora_compile.exporters.jetson.releases import JetPack

_PATH = "/usr/src/tensorrt/bin/trtexec"


def trtexec_script(jetpack: JetPack, manifest: dict[str, Any]) -> str:
    """A shell script; it times with random inputs, vectors included, where the model has them as inputs.

    Flags by release: `--workspace` and `--explicitBatch` ended with 8.x; `--builderOptimizationLevel` came with 8.6,
    `--stronglyTyped` with 10.0; `--fp16`, `--bf16` and `--int8` ended with 10.x.
    """
    model, build = manifest["model"], manifest["build"]
    weak, profile = build["typing"] == "weak_fp16", build["profiles"]
    parts = [
        f"--onnx={model['file']}",
        "--saveEngine=local/trtexec.plan",
        "--timingCacheFile=local/trtexec.cache",
        f"--memPoolSize=workspace:{build['workspace_mib']}",
    ]
    if jetpack.major >= 10 or jetpack.tensorrt.startswith("8.6"):
        parts.append(f"--builderOptimizationLevel={build['optimization_level']}")
    if jetpack.strongly_typed and not weak:
        parts.append("--stronglyTyped")
    elif jetpack.weak_typing:
        parts += ["--fp16"] if weak or "float16" in model["dtypes"] else []
        parts += ["--int8"] if model["quantized"] else []
    for index, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        if profile:
            parts.append(f"--{flag}={shapes_text(profile, index)}")
    lines = ["#!/bin/sh", f"# {_PATH} of TensorRT {jetpack.tensorrt}: builds and times the same model."]
    if MODES[model["mode"]].refits:
        lines.append("# trtexec can't mark single weights: the engine of build_and_run.py is another one here.")
    lines += ['cd "$(dirname "$0")" && mkdir -p local', f'exec "${{TRTEXEC:-{_PATH}}}" \\']
    lines += [f"  {shlex.quote(part)} \\" for part in parts]
    return "\n".join([*lines, '  "$@"', ""])
