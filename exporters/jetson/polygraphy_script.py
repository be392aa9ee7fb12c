"""The command line of Polygraphy that builds what a bundle builds, and compares it with the stored outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onelora_compile.exporters.jetson.device.stored import own_outputs
from onelora_compile.exporters.jetson.device.tensors import read_safetensors
from onelora_compile.exporters.jetson.releases import JetPack
from onelora_compile.exporters.jetson.tool_script import builder_flags, tool_script


def polygraphy_script(folder: Path, jetpack: JetPack, manifest: dict[str, Any]) -> str:
    """A shell script; `BACKEND=--onnxrt` runs it without TensorRT.

    Args:
        folder: the bundle, with its reference tensors.
        jetpack: the release, which decides the flags.
        manifest: of the bundle; its tolerances, relative to an output's largest magnitude, are absolute ones here.
    """
    build = manifest["build"]
    parts = [
        "--data-loader-script=polygraphy_data.py",
        "--load-outputs=local/polygraphy.json",
        "--save-engine=local/polygraphy.plan",
        "--load-timing-cache=local/polygraphy.cache",
        "--save-timing-cache=local/polygraphy.cache",
        f"--pool-limit=workspace:{build['workspace_mib']}M",
        *builder_flags(jetpack, manifest, "--builder-optimization-level", "--strongly-typed", weak="--tf32"),
    ]
    for index, flag in enumerate(("min", "opt", "max")):
        if build["profiles"]:
            parts += [
                f"--trt-{flag}-shapes",
                *(f"{n}:{list(s[index])}".replace(" ", "") for n, s in build["profiles"].items()),
            ]
    parts += ["--rtol=0", "--atol", *(f"{name}:{value:.3g}" for name, value in _absolute(folder, manifest).items())]
    about = "Polygraphy (pip install polygraphy) builds the model and compares it with stored outputs."
    begin = [
        'cd "$(dirname "$0")" && mkdir -p local || exit',
        "python3 polygraphy_data.py local/polygraphy.json || exit",
    ]
    command = f"${{POLYGRAPHY:-polygraphy}} run {manifest['model']['file']} ${{BACKEND:---trt}}"
    return tool_script(about, "Polygraphy", manifest, begin, command, parts)


def _absolute(folder: Path, manifest: dict[str, Any]) -> dict[str, float]:
    """What each output may differ by, over all stored cases with the bundle's own adapter."""
    begin = own_outputs(manifest)
    largest = dict.fromkeys(manifest["tolerance"], 0.0)
    for entry in manifest["reference"]:
        tensors, _ = read_safetensors(str(folder / entry["file"]))
        for name in largest:
            largest[name] = max([largest[name], *map(abs, tensors[begin + name].values())])
    return {name: allowed * largest[name] for name, allowed in manifest["tolerance"].items()}
