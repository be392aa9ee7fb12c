"""Run an engine, with the adapter that is in use."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onelora_compile.errors import ExportError, StateError
from onelora_compile.exporters.jetson.device.core.engine import Context
from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.tensorrt.feed import (
    TORCH_DTYPES,
    Adapter,
    adapter_id,
    feed_of,
    offsets_of,
    vectors_to_feed,
)
from onelora_compile.exporters.tensorrt.gpu_memory import Array, device_memory
from onelora_compile.exporters.tensorrt.library import find_api
from onelora_compile.exporters.tensorrt.manifest import EngineTensor, Manifest
from onelora_compile.exporters.tensorrt.messages import engine_error, in_our_words
from onelora_compile.exporters.tensorrt.refit import load_engine, refit_loaded, vectors_for
from onelora_compile.file_names import as_path


class EngineRunner:
    """An engine on the GPU, and the adapter that its calls use.

    One runner is for one thread at a time; `with_adapter` makes another one of the same engine, with an execution
    context, buffers and an adapter of its own.

    Buffers keep their addresses while the shapes stay the same, and `use` overwrites vectors where they are: a CUDA
    graph that captured `launch` goes on to work, with the new adapter.

    Args:
        path: an engine of `build_engine`, with its manifest beside it.
        adapter: as in `use`.
        profile: number of the optimization profile, where it was built with several.
        memory: "torch", or "cuda", its runtime library; "auto" takes the first of the two that has a GPU.

    Raises:
        FileNotFoundError: no engine, or no manifest beside it.
        StateError: the engine was built for another device or library, or there is no GPU.
        ExportError: the engine is not the manifest's, or TensorRT refuses it.
        MissingExtraError: TensorRT is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], adapter: Adapter | int = None, profile: int = 0, memory: str = "auto"
    ) -> None:
        self.path = as_path(path, "path")
        self.manifest = Manifest.read(self.path)
        self.manifest.check_file(self.path)
        self._api = find_api(self.manifest.flavour)
        self.manifest.check_library(self._api, self.path)
        self._memory: Any = device_memory(memory)
        self.manifest.check_device(self._memory.target(), self.path)
        self._profile = profile
        self._api.messages.clear()
        self.engine = load_engine(self._api, self.path, self.manifest)
        self._sharers: weakref.WeakSet[EngineRunner] = weakref.WeakSet()  # of the engine
        self._open()
        if adapter is not None:
            self.use(adapter)

    @property
    def mode(self) -> str:
        """How the engine carries its vectors: "base", "fold", "input", "bank" or "refit"."""
        return self.manifest.mode

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs that a call gives; vectors and ids of a bank are the runner's."""
        traits = self.manifest.traits
        own = set(self.manifest.vectors) if traits.feeds_vectors else {IDS} if traits.feeds_ids else set()
        return [one.name for one in self.manifest.inputs if one.name not in own]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs."""
        return [one.name for one in self.manifest.outputs]

    def use(self, adapter: Adapter | int) -> None:
        """Let the calls that follow use another adapter.

        Args:
            adapter: an adapter file, or one that was read; None is what the engine was built with ("input", "refit") or
                the base ("bank"). For a bank: the name of an adapter that it holds, or its id.

        Raises:
            StateError: the vectors are in the engine's weights; or mode "refit", and several runners share the engine.
            AdapterFileError, BaseMismatchError: the adapter does not belong to the engine.
            ExportError: TensorRT refuses the refit.
        """
        if self.manifest.traits.feeds_ids:
            self._id = adapter_id(self.manifest, self.path, adapter)
            return
        if isinstance(adapter, int):
            raise StateError(f"{self.path} is no bank: give an adapter file, not the number {adapter}")
        if self.manifest.traits.refits:
            if len(self._sharers) > 1:
                raise StateError(
                    f"{len(self._sharers)} runners share {self.path}, whose adapter is in its weights: use one runner, "
                    "or an "
                    "engine of mode 'input', which has an adapter for each"
                )
            file = self.manifest.initial_adapter(self.path) if adapter is None else adapter
            _, values = vectors_for(self.manifest, self.path, file)
            self._memory.synchronize()
            refit_loaded(self._api, self.engine, values, self.manifest, self.path)
            return
        self._upload(vectors_to_feed(self.manifest, self.path, adapter))

    def run(
        self, inputs: Mapping[str, Array] | Sequence[Array], adapter_ids: Sequence[int] | np.ndarray | None = None
    ) -> list[Any]:
        """The outputs of one call: tensors if the first input is one, on its device; else numpy arrays.

        Args:
            inputs: arrays or tensors by name, or in the order of `input_names`, in the engine's dtypes.
            adapter_ids: for a bank, the adapter of each row, -1 the base; None takes that of `use` for all.

        Raises:
            ExportError: inputs that the engine does not take, or TensorRT can't run it.
            StateError: adapter_ids for an engine that is no bank.
        """
        feed = feed_of(self.manifest, self.path, self.input_names, inputs, adapter_ids, self._id)
        for name, array in feed.items():
            self._feed(name, array)
        outputs = self._prepare_outputs()
        self.launch()
        first = next(iter(feed.values()), None)
        found: list[Any] = []
        for tensor, shape in outputs:
            dtype = TORCH_DTYPES[tensor.dtype]
            size = int(np.prod(shape)) * dtype.itemsize
            value = self._memory.download(self._buffer(tensor.name, size), size).view(dtype).reshape(shape)
            if isinstance(first, torch.Tensor):
                found.append(value.to(first.device))
            else:
                found.append(value.cpu() if dtype is torch.bfloat16 else value.cpu().numpy())
        return found

    def launch(self, stream: int | None = None) -> None:
        """Enqueue the engine on the inputs that are in its buffers, as the last `run` left them, and return at once.

        Args:
            stream: handle of a CUDA stream, for example that of a graph's capture; None is the runner's own.
        """
        with in_our_words(self.path, self._api):
            self._context.enqueue(stream)

    def with_adapter(self, adapter: Adapter | int = None) -> EngineRunner:
        """Another runner of the same engine, with a context, buffers and an adapter of its own; for another thread too.

        Raises:
            StateError: mode "refit": the adapter is in the weights, which contexts share.
        """
        if self.manifest.traits.refits and adapter is not None:
            raise StateError(
                f"{self.path} has one adapter for all its contexts (mode 'refit'): call use(adapter) before"
            )
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._open()
        if adapter is not None:
            other.use(adapter)
        return other

    def _open(self) -> None:
        """A context with buffers of its own."""
        self._sharers.add(self)
        with in_our_words(self.path, self._api):
            self._context = Context(self.engine, self._memory, self._profile)
        self._id = -1
        self._offsets, size = offsets_of(self.manifest)
        if self._offsets:
            self._packed: Any = self._memory.allocate(size)
            start = self._memory.address(self._packed)
            with in_our_words(self.path, self._api):
                for name, offset in self._offsets.items():
                    self._context.set_address(name, start + offset)
            self._upload(vectors_to_feed(self.manifest, self.path, None))

    def _upload(self, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            self._memory.upload(self._packed, self._offsets[name], value)

    def _feed(self, name: str, array: Array) -> None:
        shape = tuple(array.shape)
        if not self._context.set_shape(name, shape):
            allowed = [profile.get(name) for profile in self.manifest.profiles]
            raise engine_error(
                f"{self.path}: input {name!r} of {list(shape)} is not in its profile {allowed}", self._api
            )
        self._memory.upload(self._buffer(name, _bytes(array)), 0, array)

    def _prepare_outputs(self) -> list[tuple[EngineTensor, tuple[int, ...]]]:
        found = []
        for tensor in self.manifest.outputs:
            shape = self._context.shape(tensor.name)
            if any(size < 0 for size in shape):
                raise ExportError(
                    f"{self.path}: the shape of output {tensor.name!r} {list(shape)} depends on values, which "
                    "EngineRunner "
                    "does not support"
                )
            self._buffer(tensor.name, int(np.prod(shape)) * TORCH_DTYPES[tensor.dtype].itemsize)
            found.append((tensor, shape))
        return found

    def _buffer(self, name: str, size: int) -> Any:
        with in_our_words(self.path, self._api):
            return self._context.buffer(name, size)


def _bytes(array: Array) -> int:
    return array.numel() * array.element_size() if isinstance(array, torch.Tensor) else array.nbytes
