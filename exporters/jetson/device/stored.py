"""The reference tensors of a bundle as other tools take them: what the model is fed, and what it gives."""

from __future__ import annotations

from typing import Any, Iterator

from .adapters import BUILT, vectors_of
from .core.modes import IDS, MODES
from .folder import Folder
from .measure import inputs_of, references
from .tensors import Tensor


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


def own_outputs(manifest: dict[str, Any]) -> str:
    """How the names of the stored outputs begin that `model.onnx` gives as it lies there."""
    refits = MODES[manifest["model"]["mode"]].refits
    return f"outputs/{BUILT if refits else manifest['default']}/"


def expected(folder: Folder) -> list[dict[str, Any]]:
    """What `model.onnx` gives for each of `feeds`; arrays of NumPy."""
    begin = own_outputs(folder.manifest)
    return [
        {name[len(begin) :]: value.numpy() for name, value in tensors.items() if name.startswith(begin)}
        for tensors in references(folder).values()
    ]
