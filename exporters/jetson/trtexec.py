"""The command line of `trtexec` that builds what a bundle builds, with the flags of that TensorRT."""

from __future__ import annotations

from typing import Any

from onelora_compile.exporters.jetson.device.ort_providers import shapes_text
from onelora_compile.exporters.jetson.releases import JetPack
from onelora_compile.exporters.jetson.tool_script import builder_flags, tool_script

_PATH = "/usr/src/tensorrt/bin/trtexec"


def trtexec_script(jetpack: JetPack, manifest: dict[str, Any]) -> str:
    """A shell script; it times with random inputs, vectors included, where the model has them as inputs.

    `--workspace` and `--explicitBatch` ended with 8.x; other flags by release are in `builder_flags`.
    """
    build, profile = manifest["build"], manifest["build"]["profiles"]
    parts = [
        f"--onnx={manifest['model']['file']}",
        "--saveEngine=local/trtexec.plan",
        "--timingCacheFile=local/trtexec.cache",
        f"--memPoolSize=workspace:{build['workspace_mib']}",
        *builder_flags(jetpack, manifest, "--builderOptimizationLevel", "--stronglyTyped"),
    ]
    for index, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        if profile:
            parts.append(f"--{flag}={shapes_text(profile, index)}")
    about = f"{_PATH} of TensorRT {jetpack.tensorrt}: builds and times the same model."
    begin = ['cd "$(dirname "$0")" && mkdir -p local']
    return tool_script(about, "trtexec", manifest, begin, f'"${{TRTEXEC:-{_PATH}}}"', parts)
