"""The reference tensors of a bundle as other tools take them: what the model is fed, and what it gives."""

from __future__ import annotations

from typing import Any, Iterator

from .adapters import vectors_of
from .core.modes import IDS
from .folder import Folder
from .measure import inputs_of, references
from .tensors import Tensor

BUILT = "(built)"  # what a model with vectors that are refitted later is stored with


def feeds(folder: Folder) -> Iterator[dict[str, Any]]:
    """Every input of `model.onnx` for each case, with the bundle's own adapter; arrays of NumPy."""
    for tensors in references(folder).values():
        inputs = inputs_of(tensors)
        if folder.traits.feeds_vectors:
            inputs.update(vectors_of(folder, folder.find(folder.manifest["default"])))
        if folder.traits.feeds_ids:
            row = folder.manifest["bank"].index(folder.manifest["default"])
            inputs[IDS] = Tensor.full("int64", (inputs[folder.manifest["model"]["batch_input"]].shape[0],), row)
        yield {name: value.numpy() for name, value in inputs.items()}


def expected(folder: Folder) -> list[dict[str, Any]]:
    """What `model.onnx` gives for each of `feeds`; arrays of NumPy."""
    begin = f"outputs/{BUILT if folder.traits.refits else folder.manifest['default']}/"
    return [
        {name[len(begin) :]: value.numpy() for name, value in tensors.items() if name.startswith(begin)}
        for tensors in references(folder).values()
    ]
