"""Writing an engine with what stands beside it, over no input and no file of another kind."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onelora_compile.exporters.tensorrt.manifest import Manifest, manifest_path
from onelora_compile.exporters.tensorrt.vectors import hash_files
from onelora_compile.weights.adapter_file import AdapterFile, write_adapter
from onelora_compile.weights.atomic_write import (
    refuse_overwriting,
    replacing_all,
)
from onelora_compile.weights.file_kinds import refuse_other_kinds


def write_engine(
    engine: Path, plan: Any, manifest: Manifest, initial: AdapterFile | None
) -> tuple[list[Path], Manifest]:
    """Write an engine, its manifest and the vectors it starts with: all of them, or none.

    Args:
        engine: the file.
        plan: its bytes, as a buffer: a copy of some gigabytes would take minutes.
        manifest: without the hash.
        initial: the vectors.
    """
    files = [engine, manifest_path(engine), *([engine.with_name(manifest.initial)] if initial is not None else [])]
    with replacing_all(files) as (plan_file, manifest_file, *initial_file):
        with open(plan_file, "wb") as stream:
            stream.write(plan)
        manifest = dataclasses.replace(manifest, engine_sha256=hash_files([plan_file]))
        manifest_file.write_text(manifest.to_json(), encoding="utf-8")
        if initial is not None:
            write_adapter(initial, *initial_file)
    return files, manifest


def refuse_overwriting_engine(engine: Path, inputs: Sequence[Any]) -> None:
    """Check that an engine, and what is written beside it, is none of the inputs; what is no path is skipped.

    Nor is it named like a file of another kind.
    """
    read = [one for one in inputs if isinstance(one, str | os.PathLike)]
    for written in (engine, manifest_path(engine), engine.with_name(f"{engine.name}.safetensors")):
        refuse_overwriting(written, read, "engine")
    refuse_other_kinds(engine, ".engine", "engine")
