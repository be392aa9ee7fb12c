"""The adapters of a bank: read, and held against the model that they are exported with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from onelora_compile.adapting.adapter import undo_adapt
from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.errors import AdapterFileError, ConfigError
from onelora_compile.exporters.jetson.device.core.names import why_no_name
from onelora_compile.exporters.onnx_file.trained import Trained
from onelora_compile.exporters.to_onnx.place_vectors import Vectors
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import float32
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.fits_model import check_base
from onelora_compile.weights.loading import load_adapter


@contextlib.contextmanager
def carrying(root: nn.Module, bank: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """A model that nobody adapted carries the adapter of a bank that trained most while it is exported."""
    if not bank or adapted_weights(root):
        yield
        return
    load_adapter(root, max(bank, key=lambda path: len(read_adapter(path).tensors)))
    try:
        yield
    finally:
        undo_adapt(root)


def read_bank(root: nn.Module, trained: Trained, files: Sequence[str | os.PathLike[str]]) -> dict[str, Vectors]:
    """What each file trained, by a name for it."""
    bank: dict[str, Vectors] = {}
    for path in files:
        file = read_adapter(path)
        _check_bankable(root, trained, file, path)
        name = Path(path).name.removesuffix(".safetensors")
        if why := why_no_name(name):
            raise ConfigError(
                f"{str(path)!r}: its name is the adapter's, and {name!r} is none, as {why}: rename the file"
            )
        if name in bank:
            raise ConfigError(f"two files of the bank are called {name!r}: their names tell the adapters apart")
        bank[name] = {one: float32(value) for one, value in file.tensors.items() if one not in trained.counters}
    return bank


def _check_bankable(root: nn.Module, trained: Trained, file: AdapterFile, path: str | os.PathLike[str]) -> None:
    here = adapted_weights(root)
    if other := sorted(set(file.vectors) - set(here)):
        raise AdapterFileError(f"{path} has vectors that the model does not have: {shortened(other)}")
    check_base({name: here[name] for name in file.vectors}, file, path)
    saved = {name: value for name, value in file.saved.items() if name not in trained.counters}
    if other := sorted(set(saved) - set(trained.values)):
        raise AdapterFileError(
            f"{path} also trained {shortened(other)}, which the model does not train: export it adapted with "
            "modules_to_save and train_norms as that file was, or not adapted"
        )
    if wrong := [name for name, value in saved.items() if tuple(value.shape) != trained.values[name].shape]:
        raise AdapterFileError(f"{path}: {shortened(wrong)} have other shapes than the model's")
