"""What the manifest of a bundle says, and what its engine will compute in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onelora_compile.errors import StateError
from onelora_compile.exporters.jetson.device.core.modes import BASE, IDS
from onelora_compile.exporters.jetson.device.folder import FORMAT_VERSION, sha256_of
from onelora_compile.exporters.jetson.fit_model import Fitted
from onelora_compile.exporters.jetson.releases import JetPack
from onelora_compile.printable import shortened
from onelora_compile.version import __version__

FORMAT = "onelora-bundle"
# Largest difference on the device over the largest magnitude of an output.  float32 is computed in TF32 there, with 10
# bits of mantissa.  Not measured on a device: `selftest --tolerance` takes another one.
_ON_DEVICE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 5e-2, "int8": 1e-1}


def manifest_of(
    fitted: Fitted,
    jetpack: JetPack,
    source: Path,
    written: Sequence[Path],
    reference: list[dict[str, str]],
) -> dict[str, Any]:
    """The manifest without `build`, `tolerance`, `adapters`, `default` and `files`."""
    sums = [f"{path.name} {sha256_of(str(path))}" for path in written]
    first = next((str(v.name) for v in fitted.model.graph.inputs if v.name != IDS), "")
    metadata = fitted.metadata
    swappable = bool(fitted.values)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "producer": f"onelora-compile {__version__}",
        "device": {
            "jetpack": jetpack.version,
            "l4t": jetpack.l4t,
            "tensorrt": jetpack.tensorrt,
            "python": jetpack.python,
            "sm": list(jetpack.sm),
        },
        "model": {
            "file": "model.onnx",
            "files": [path.name for path in written],
            "vectors_file": next((path.name for path in written if path.suffix == ".vectors"), ""),
            "order": list(fitted.values),
            "sha256": hashlib.sha256("\n".join(sums).encode()).hexdigest(),
            "source_sha256": sha256_of(str(source)),
            "mode": fitted.mode,
            "opset": fitted.model.opset_imports[""],
            "dtypes": fitted.dtypes,
            "quantized": fitted.quantized,
            "graphs": fitted.graphs,
            "batch_input": first,
        },
        "vectors": {name: list(metadata.vectors[name]) for name in metadata.vectors} if swappable else {},
        "fingerprints": {n: one.to_json() for n, one in metadata.fingerprints.items()} if swappable else {},
        "trained": list(metadata.trained) if swappable else [],
        "constant": dict(metadata.constant) if swappable else {},
        "bank": list(metadata.adapters) if fitted.traits.feeds_ids else [],
        "reference": reference,
    }


def adapter_entries(folder: Path, fitted: Fitted, files: Mapping[str, Path]) -> tuple[list[dict[str, str]], str]:
    """The adapters of the manifest, and the name of the first one in use."""
    if fitted.traits.fixed:
        name = "base" if fitted.traits is BASE else "folded"
        return [{"name": name, "file": "", "sha256": fitted.metadata.sha256}], name
    if fitted.traits.feeds_ids:
        names = [*fitted.metadata.adapters, "base"]
        return [{"name": name, "file": "", "sha256": ""} for name in names], names[0]
    paths = {name: f"adapters/{name}.safetensors" for name in ("default", *files)}
    entries = [{"name": name, "file": file, "sha256": sha256_of(str(folder / file))} for name, file in paths.items()]
    if not fitted.metadata.trained:  # with vectors alone, zeros are the base; of heads and norms nothing here knows it
        entries.append({"name": "base", "file": "", "sha256": ""})
    return entries, "default"


def tolerances(fitted: Fitted, weak_fp16: bool) -> dict[str, float]:
    """What each output may differ by on the device."""
    narrow = [name for name in _ON_DEVICE if name in fitted.dtypes] + (["float16"] if weak_fp16 else [])
    narrow += ["int8"] if fitted.quantized else []
    allowed = max((_ON_DEVICE[name] for name in narrow), default=_ON_DEVICE["float32"])
    outputs = fitted.model.graph.outputs
    return {str(v.name): allowed if v.dtype and v.dtype.is_floating_point() else 0.0 for v in outputs}


def types_text(fitted: Fitted, jetpack: JetPack, weak_fp16: bool) -> str:
    """What an engine of the model computes in, for people."""
    main = fitted.dtypes[0] if fitted.dtypes else "float32"
    if weak_fp16:
        return "TensorRT chooses float32 or float16 for each layer"
    if jetpack.strongly_typed:
        return f"{main}, as the model has it" + (
            ": for float16 export with dtype=torch.float16" if main == "float32" and not fitted.quantized else ""
        )
    if main == "float32" and not fitted.quantized:
        return "float32: for float16 export with dtype=torch.float16, or pass weak_fp16=True"
    return f"{main} allowed, TensorRT {jetpack.tensorrt} may take float32 for some layers"


def check_free(out: Path) -> None:
    """Whether a bundle may be written to a path: nothing is there, an empty folder, or a bundle and nothing else.

    Raises:
        StateError: something else is there, or a bundle that somebody added files to.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if (out / "local").exists():
        raise StateError(f"{out} is a bundle that was built or updated in its place: remove it, or give another name")
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        ours = {"manifest.json", *manifest["files"]} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = set()
    if not ours:
        raise StateError(f"{out} is there and is no bundle: give another name")
    found = (path.relative_to(out) for path in out.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts)
    if more := sorted(path.as_posix() for path in found if path.as_posix() not in ours):
        raise StateError(f"{out} is a bundle, and holds what is none of it: {shortened(more)}. Give another name")
