"""What a call of an engine feeds: inputs, vectors, ids of a bank; checked before TensorRT sees them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from onelora_compile.errors import ExportError, StateError
from onelora_compile.exporters.jetson.device.core.engine import DTYPES
from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.onnx_file.metadata import bank_id, checked_ids
from onelora_compile.exporters.tensorrt.gpu_memory import ALIGNMENT, Array
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter

Adapter = str | os.PathLike[str] | AdapterFile | None

# By TensorRT's names. numpy has no bfloat16: such outputs are tensors.
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, ours) for name, ours in DTYPES.items()}


def offsets_of(manifest: Manifest) -> tuple[dict[str, int], int]:
    """Where each vector is in the one buffer that holds all, aligned for TensorRT, and the buffer's size in bytes."""
    offsets, end = {}, 0
    for name, shape in manifest.vectors.items() if manifest.traits.feeds_vectors else ():
        offsets[name] = end
        end += -(-4 * int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
    return offsets, end


def vectors_to_feed(manifest: Manifest, engine: Path, adapter: Adapter) -> dict[str, np.ndarray]:
    """The float32 vectors of an adapter for an engine of mode "input"; None is what it was built with.

    Raises:
        StateError: the vectors are in the engine's weights.
        AdapterFileError, BaseMismatchError: the adapter does not belong to the engine.
    """
    if not manifest.traits.feeds_vectors:
        if adapter is None:
            return {}
        raise StateError(
            f"the vectors of {engine} are in its weights (mode {manifest.mode!r}): build it with adapters='input', "
            "'bank' "
            "or 'refit' to swap them"
        )
    file = manifest.initial_adapter(engine) if adapter is None else adapter
    file = file if isinstance(file, AdapterFile) else read_adapter(file)
    manifest.metadata.check_fits(file, str(engine))
    return manifest.metadata.values_of(file)


def adapter_id(manifest: Manifest, engine: Path, adapter: Adapter | int) -> int:
    """The number of a bank's adapter, from its name, its file (by content), or itself; -1 of None, the base.

    Raises:
        ExportError: the bank has no such adapter.
    """
    names = manifest.adapters
    if adapter is None:
        return -1
    if isinstance(adapter, int):
        if not -1 <= adapter < len(names):
            raise ExportError(f"{engine} has adapters 0 to {len(names) - 1}, and -1 for the base; not {adapter}")
        return adapter
    return bank_id(manifest.metadata, engine, adapter)


def feed_of(
    manifest: Manifest,
    engine: Path,
    names: Sequence[str],
    inputs: Mapping[str, Array] | Sequence[Array],
    adapter_ids: Sequence[int] | np.ndarray | None,
    default_id: int,
) -> dict[str, Array]:
    """What a call feeds, without vectors: names, dtypes and ids of a bank checked.

    Raises:
        ExportError: missing, unknown or wrongly typed inputs, or ids that the bank does not have.
        StateError: ids for an engine that is no bank.
    """
    if not isinstance(inputs, Mapping):
        if len(inputs) != len(names):
            raise ExportError(f"{engine} takes {len(names)} inputs {list(names)}; {len(inputs)} were given")
        inputs = dict(zip(names, inputs, strict=True))
    if set(inputs) != set(names):
        raise ExportError(f"{engine} takes the inputs {shortened(names)}; given were {shortened(inputs)}")
    feed: dict[str, Array] = {name: inputs[name] for name in names}
    if manifest.traits.feeds_ids:
        count = len(manifest.adapters)
        rows = next(feed[name].shape[0] for name in names if feed[name].ndim)
        ids = checked_ids(np.full(rows, default_id) if adapter_ids is None else adapter_ids, count, rows)
        feed[IDS] = np.where(ids < 0, count, ids)  # the zero row is the last; not every Gather counts from the end
    elif adapter_ids is not None:
        raise StateError(f"{engine} is no bank (its mode is {manifest.mode!r}): adapter_ids means nothing to it")
    dtypes = {one.name: one.dtype for one in manifest.inputs}
    for name, array in feed.items():
        wanted = TORCH_DTYPES[dtypes[name]]
        given = str(array.dtype).removeprefix("torch.")
        if given != str(wanted).removeprefix("torch."):
            raise ExportError(f"{engine}: input {name!r} is {wanted}, {given} was given")
    return feed
