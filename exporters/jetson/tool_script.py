"""What the scripts of a bundle that run NVIDIA's tools have in common: flags by release, and their form."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from onelora_compile.exporters.jetson.device.core.modes import MODES
from onelora_compile.exporters.jetson.releases import JetPack


def builder_flags(
    jetpack: JetPack, manifest: dict[str, Any], level: str, strongly_typed: str, weak: str = ""
) -> list[str]:
    """How long the builder searches, and in which types it computes.

    The level came with TensorRT 8.6, strong typing with 10.0; `--fp16`, `--bf16` and `--int8` ended with 10.x.

    Args:
        jetpack: the release.
        manifest: of the bundle.
        level: the tool's flag of the optimization level.
        strongly_typed: its flag of an engine whose types are the file's.
        weak: a further flag of one whose types the builder chooses.
    """
    model, build = manifest["model"], manifest["build"]
    weak_fp16, parts = build["typing"] == "weak_fp16", []
    if jetpack.major >= 10 or jetpack.tensorrt.startswith("8.6"):
        parts.append(f"{level}={build['optimization_level']}")
    if jetpack.strongly_typed and not weak_fp16:
        parts.append(strongly_typed)
    elif jetpack.weak_typing:
        parts += ["--fp16"] if weak_fp16 or "float16" in model["dtypes"] else []
        parts += ["--int8"] if model["quantized"] else []
        parts += [weak] if weak else []
    return parts


def tool_script(
    about: str, tool: str, manifest: dict[str, Any], begin: Sequence[str], command: str, parts: Sequence[str]
) -> str:
    """A shell script that hands its arguments on.

    Args:
        about: its first line.
        tool: what the tool is called.
        manifest: of the bundle.
        begin: what it does before, in lines of shell.
        command: the tool, in shell.
        parts: its arguments.
    """
    lines = ["#!/bin/sh", f"# {about}"]
    if MODES[manifest["model"]["mode"]].refits:
        lines.append(f"# {tool} can't mark single weights: the engine of build_and_run.py is another one here.")
    lines += [*begin, f"exec {command} \\", *(f"  {shlex.quote(part)} \\" for part in parts)]
    return "\n".join([*lines, '  "$@"', ""])
