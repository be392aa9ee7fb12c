"""What computes a batch whose rows have adapters of their own: a bank in ONNX Runtime, or a compiled model.

Both take adapters while batches run; an adapter that does not fit is an error and changes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import onelora_compile as onelora
from onelora_compile.errors import AdapterFileError, ConfigError, StateError
from onelora_compile.examples.serving.fields import Field
from onelora_compile.exporters import OnnxRunner
from onelora_compile.weights.adapter_content import AdapterFile

Names = Sequence[str | None]
Arrays = dict[str, np.ndarray]
_DTYPES = {"float": "float32", "double": "float64"}  # ONNX's words where they are not NumPy's


class Backend(Protocol):
    """What the server asks of a model."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """The inputs of one example."""

    def adapters(self) -> list[str]:
        """The adapters that requests may name."""

    def add(self, path: str | os.PathLike[str], name: str) -> None:
        """Take one more adapter from a file; requests may name it once this returns."""

    def run(self, names: Names, inputs: Arrays) -> Arrays:
        """Outputs [batch, …] by name, of inputs [batch, …] and the adapter of each row; None is the base."""


class OnnxBank:
    """A file of `export_onnx(adapters="bank")` with a batch axis that is dynamic.

    Args:
        path: the file.
        room: how many adapters can be added.
    """

    def __init__(self, path: str | os.PathLike[str], room: int = 1000) -> None:
        self._runner = OnnxRunner(path, room=room)
        held = {one.name: one for one in self._runner.session.get_inputs() if one.name in self._runner.input_names}
        if fixed := [name for name, one in held.items() if not one.shape or isinstance(one.shape[0], int)]:
            raise ConfigError(f"{path}: {fixed} have no dynamic batch: export with dynamic_shapes='batch'")
        self.fields = {name: _onnx_field(one) for name, one in held.items()}

    def adapters(self) -> list[str]:
        """Those of the file, and what was added."""
        return list(self._runner.metadata.adapters)

    def add(self, path: str | os.PathLike[str], name: str) -> None:
        """Into free rows of the tables."""
        self._runner.add_adapter(path, name)

    def run(self, names: Names, inputs: Arrays) -> Arrays:
        """One call of the session."""
        ids = [self._runner.adapter_id(name) for name in names]
        return dict(zip(self._runner.output_names, self._runner.run(inputs, adapter_ids=ids), strict=True))


def _onnx_field(node: Any) -> Field:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    sizes = tuple(size if isinstance(size, int) else None for size in node.shape[1:])
    return Field(np.dtype(_DTYPES.get(kind, kind)), sizes)


class CompiledRows:
    """A model under `torch.compile(backend="onelora")`; it is adapted, where it is not yet, on all linears.

    Heads, norms and weights that are read have one value for a whole batch: an adapter that differs from the others in
    these is refused.

    Args:
        model: on its device.
        inputs: an example batch by the names of the model's arguments; the first axis is the batch.
        free: of inputs by name, the axes besides the batch whose size a request chooses; the example's is 2 or more.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], free: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self._known = list(onelora.adapters(model))
        self._model = model.eval() if self._known else onelora.adapt(model.eval())
        self._device = next(model.parameters()).device
        self._fast = torch.compile(self._model, backend="onelora", dynamic=True)
        self._adding = threading.Lock()
        self._dtypes = {name: tensor.dtype for name, tensor in inputs.items()}
        example = {name: _plain(tensor) for name, tensor in inputs.items()}
        self.fields = {name: _field_like(one, (free or {}).get(name, ())) for name, one in example.items()}
        # Compiled now, so that no request waits for it: sizes of 1 have graphs of their own.
        for batch in (1, 2):
            for one in [example, _shortest(example, free)] if free else [example]:
                self.run([None] * batch, {name: np.repeat(value[:1], batch, axis=0) for name, value in one.items()})

    def adapters(self) -> list[str]:
        """Those that the model had, and what was added."""
        return list(self._known)

    def add(self, path: str | os.PathLike[str], name: str) -> None:
        """Into a row of the model's table."""
        with self._adding:
            if name in onelora.adapters(self._model):
                raise StateError(f"there is an adapter {name!r} already: add it under another name")
            self._refuse_changes(onelora.read_adapter(path), path)
            onelora.load_adapter(self._model, path, adapter_name=name)
            try:
                with onelora.rows(self._model, [*self._known, name]):
                    pass  # refuses what has no row for each adapter
            except StateError:
                onelora.delete_adapter(self._model, name)
                raise
            self._known.append(name)

    def _refuse_changes(self, file: AdapterFile, path: str | os.PathLike[str]) -> None:
        """Refuse what a model would be captured anew for, while it runs."""
        if other := sorted(set(file.vectors) - set(onelora.vectors(self._model))):
            raise AdapterFileError(f"{path} has vectors on {other[:3]}, which the model was started without")
        if whole := sorted(set(file.saved) & {name for name, _ in self._model.named_parameters()}):
            raise AdapterFileError(
                f"{path} trained {whole[:3]} as a whole, of which a compiled model has one for all rows of a batch; a "
                "bank in ONNX Runtime has one for each adapter"
            )

    def run(self, names: Names, inputs: Arrays) -> Arrays:
        """One call of the compiled model."""
        given = {name: torch.from_numpy(one) for name, one in inputs.items()}
        tensors = {name: one.to(self._device, self._dtypes[name]) for name, one in given.items()}
        with torch.no_grad(), onelora.rows(self._model, names):
            return _named(self._fast(**tensors))


def _field_like(example: np.ndarray, free: Sequence[int]) -> Field:
    sizes = tuple(None if axis in free else size for axis, size in enumerate(example.shape))
    return Field(example.dtype, sizes[1:])


def _shortest(example: Arrays, free: Mapping[str, Sequence[int]]) -> Arrays:
    """The example with a size of 1 on every axis that a request chooses."""
    axes = {name: set(free.get(name, ())) for name in example}
    return {
        name: value[tuple(slice(1) if axis in axes[name] else slice(None) for axis in range(value.ndim))]
        for name, value in example.items()
    }


def _named(outputs: Any) -> Arrays:
    """The tensors that a model returns, by name."""
    if isinstance(outputs, Tensor):
        outputs = {"output": outputs}
    elif not isinstance(outputs, Mapping):
        outputs = {f"output_{number}": one for number, one in enumerate(outputs)}
    tensors = {name: one for name, one in outputs.items() if isinstance(one, Tensor)}
    return {name: _plain(one) for name, one in tensors.items()}


def _plain(tensor: Tensor) -> np.ndarray:
    """A tensor for NumPy, which has no bfloat16."""
    plain = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    array: np.ndarray = plain.detach().cpu().numpy()
    return array
