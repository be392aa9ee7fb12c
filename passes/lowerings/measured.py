"""How long each lowering takes on this machine's GPU, measured once for each shape and kept on disk.

One JSON file for each shape, dtype, device and set of versions, written beside and renamed: several processes may
write at once, and a killed one leaves nothing half.  A file that can't be read, or that belongs to another key, is
measured again.  Folder: $ONELORA_CACHE_DIR, else ~/.cache/onelora_compile.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from onelora_compile.passes.lowerings.lowering import Shape
from onelora_compile.passes.lowerings.on_gpu import measure_on_gpu
from onelora_compile.version import __version__
from onelora_compile.weights.atomic_write import replacing

log = logging.getLogger("onelora_compile.lowerings")

Measure = Callable[[Shape, str, str], float]  # shape, name of a lowering, device -> seconds


def seconds(
    shape: Shape, names: Sequence[str], device: str, measure: Measure | None = None, folder: Path | None = None
) -> dict[str, float]:
    """Seconds of one forward and backward by each lowering, from the cache or measured now; inf for one that fails.

    Args:
        shape: of the linear.
        names: of lowerings.
        device: where, for example "cuda:0".
        measure: measures one; None for the GPU's own clock.
        folder: of the cache; None for the user's.
    """
    key = _key(shape, names, device)
    text = json.dumps(key, sort_keys=True)
    file = (folder or cache_folder()) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if (known := _read(file, key, names)) is not None:
        return known
    times: dict[str, float | None] = {name: _measured(measure or measure_on_gpu, shape, name, device) for name in names}
    found = {name: math.inf if value is None else value for name, value in times.items()}
    if None in times.values():  # for want of memory, which there may be another time
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as beside:
            beside.write_text(json.dumps({"key": key, "seconds": found}, indent=1))
    except OSError as error:
        log.warning("the measured choice of a lowering is not kept: %s", error)
    return found


def _measured(measure: Measure, shape: Shape, name: str, device: str) -> float | None:
    """One time; a lowering that fails must not take the user's training with it."""
    try:
        return measure(shape, name, device)
    except Exception as error:  # Triton raises many kinds, of its compiler and of the driver
        kind = type(error).__name__
        log.warning("lowering %s fails on %s for %s, and is not taken: %s: %s", name, device, shape, kind, error)
        return None if isinstance(error, torch.OutOfMemoryError) else math.inf


def cache_folder() -> Path:
    """Where measurements are kept."""
    own = os.environ.get("ONELORA_CACHE_DIR")
    return Path(own) if own else Path.home() / ".cache" / "onelora_compile"


def _key(shape: Shape, names: Sequence[str], device: str) -> dict[str, object]:
    sizes = {name: str(value) for name, value in dataclasses.asdict(shape).items()}
    tf32 = torch.get_float32_matmul_precision()
    return {**sizes, "names": sorted(names), "device": _device_name(device), "matmul_precision": tf32, **_versions()}


@functools.cache
def _device_name(device: str) -> str:
    one = torch.device(device)
    return torch.cuda.get_device_name(one) if one.type == "cuda" and torch.cuda.is_available() else one.type


@functools.cache
def _versions() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"torch": torch.__version__, "triton": triton, "onelora_compile": __version__}


def _read(file: Path, key: Mapping[str, object], names: Sequence[str]) -> dict[str, float] | None:
    try:
        stored = json.loads(file.read_text())
        times = {name: float(stored["seconds"][name]) for name in names}
        whole = stored["key"] == dict(key) and all(value > 0 for value in times.values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s can't be used (%s: %s): measured again", file, type(error).__name__, error)
        return None
    if not whole:
        log.warning("%s belongs to something else or holds no times: measured again", file)
    return times if whole else None
