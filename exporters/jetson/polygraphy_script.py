"""The command line of Polygraphy that builds what a bundle builds, and compares it with the stored outputs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from onelora_compile.exporters.jetson.device.core.modes import MODES
from onelora_compile.exporters.jetson.device.stored import BUILT
from onelora_compile.exporters.jetson.device.tensors import read_safetensors
from onelora_compile.exporters.jetson.releases import JetPack


def polygraphy_script(folder: Path, jetpack: JetPack, manifest: dict[str, Any]) -> str:
    """A shell script; `BACKEND=--onnxrt` runs it without TensorRT.

    Args:
        folder: the bundle, with its reference tensors.
        jetpack: the release, which decides the flags.
        manifest: of the bundle; its tolerances, relative to an output's largest magnitude, are absolute ones here.
    """
    model, build = manifest["model"], manifest["build"]
    weak = build["typing"] == "weak_fp16"
    parts = [
        "--data-loader-script=polygraphy_data.py",
        "--load-outputs=local/polygraphy.json",
        "--save-engine=local/polygraphy.plan",
        "--load-timing-cache=local/polygraphy.cache",
        "--save-timing-cache=local/polygraphy.cache",
        f"--pool-limit=workspace:{build['workspace_mib']}M",
    ]
    if jetpack.major >= 10 or jetpack.tensorrt.startswith("8.6"):
        parts.append(f"--builder-optimization-level={build['optimization_level']}")
    if jetpack.strongly_typed and not weak:
        parts.append("--strongly-typed")
    elif jetpack.weak_typing:
        parts += ["--fp16"] if weak or "float16" in model["dtypes"] else []
        parts += ["--int8"] if model["quantized"] else []
        parts.append("--tf32")
    for index, flag in enumerate(("min", "opt", "max")):
        if build["profiles"]:
            parts += [
                f"--trt-{flag}-shapes",
                *(f"{n}:{list(s[index])}".replace(" ", "") for n, s in build["profiles"].items()),
            ]
    parts += ["--rtol=0", "--atol", *(f"{name}:{value:.3g}" for name, value in _absolute(folder, manifest).items())]
    lines = ["#!/bin/sh", "# Polygraphy (pip install polygraphy) builds the model and compares it with stored outputs."]
    if MODES[model["mode"]].refits:
        lines.append("# Polygraphy can't mark single weights: the engine of build_and_run.py is another one here.")
    lines += [
        'cd "$(dirname "$0")" && mkdir -p local || exit',
        "python3 polygraphy_data.py local/polygraphy.json || exit",
    ]
    lines += [f"exec ${{POLYGRAPHY:-polygraphy}} run {model['file']} ${{BACKEND:---trt}} \\"]
    lines += [f"  {shlex.quote(part)} \\" for part in parts]
    return "\n".join([*lines, '  "$@"', ""])


def _absolute(folder: Path, manifest: dict[str, Any]) -> dict[str, float]:
    """What each output may differ by, over all stored cases with the bundle's own adapter."""
    begin = f"outputs/{BUILT if MODES[manifest['model']['mode']].refits else manifest['default']}/"
    largest = dict.fromkeys(manifest["tolerance"], 0.0)
    for entry in manifest["reference"]:
        tensors, _ = read_safetensors(str(folder / entry["file"]))
        for name in largest:
            largest[name] = max([largest[name], *map(abs, tensors[begin + name].values())])
    return {name: allowed * largest[name] for name, allowed in manifest["tolerance"].items()}
