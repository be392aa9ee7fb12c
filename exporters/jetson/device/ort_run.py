"""The bundle's model in ONNX Runtime, on its CPU, CUDA or TensorRT provider.

On a workstation, before the bundle is copied, it runs the same files by the same steps: it finds a damaged bundle, a
wrong adapter or a mistake in feeding it.  The CPU provider says nothing about TensorRT: not whether it takes the model,
nor how fast or how exact it is there.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

from .adapters import Vectors, vectors_of
from .folder import BundleError, Folder
from .options import Options
from .ort_providers import cache_of, label_of, note_of, open_session, providers_of
from .tensors import Tensor, TensorError

_TYPES = {"float": "float32", "double": "float64"}


class OnnxRuntime:
    """As `TensorRT` of trt_run.py.

    Args:
        folder: the bundle.
        options: of which `provider` is used.
        adapter: of the state; it is in the model from the start where each adapter has an engine of its own.

    Raises:
        BundleError: onnxruntime is not there, or would not run the model on the provider that was asked for.
    """

    label = "ONNX Runtime"
    faults = None

    def __init__(self, folder: Folder, options: Options, adapter: dict[str, Any]) -> None:
        self.ort, self.numpy = _modules()
        self.folder, self.options = folder, options
        self.apart = options.engine_each(folder.traits)
        self.providers = providers_of(folder, options, adapter, self.ort.__version__)
        self.vectors: dict[str, Any] = {}
        if self.apart:
            self.vectors = self._values(vectors_of(folder, adapter))
        self._open()
        self.label = label_of(self.ort, self.session, options)

    def _open(self) -> None:
        chosen = self.ort.SessionOptions()
        chosen.log_severity_level = 2 if self.options.verbose else 4
        if self.vectors and not self.folder.traits.feeds_vectors:
            chosen.add_external_initializers(list(self.vectors), list(self.vectors.values()))
        path = self.folder.file(self.folder.manifest["model"]["file"])
        self.session = open_session(self.ort, chosen, path, self.providers)
        self.inputs = {node.name: _slot(node) for node in self.session.get_inputs()}
        self.outputs = {node.name: _slot(node) for node in self.session.get_outputs()}

    def set_vectors(self, vectors: Vectors) -> None:
        """Use other vectors from now on."""
        if self.apart:
            return
        self.vectors = self._values(vectors)
        if not self.folder.traits.feeds_vectors:
            self._open()

    def _values(self, vectors: Vectors) -> dict[str, Any]:
        """Vectors that are fed with each call stay in the memory of the provider; initializers are given on the CPU."""
        on_gpu = self.folder.traits.feeds_vectors and self.options.provider != "cpu"
        where, make = "cuda" if on_gpu else "cpu", self.ort.OrtValue.ortvalue_from_numpy
        return {name: make(vector.numpy(), where, 0) for name, vector in vectors.items()}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for inputs."""
        feed: dict[str, Any] = {
            name: _fitted(name, value, *self.inputs[name]).numpy() for name, value in inputs.items()
        }
        if self.folder.traits.feeds_vectors:
            feed.update(self.vectors)
        try:
            found = self.session.run(None, feed)
        except Exception as error:  # onnxruntime's exceptions share no base
            raise BundleError(f"ONNX Runtime can't run the model: {error}") from None
        return {name: Tensor.of(self.numpy.asarray(value)) for name, value in zip(self.outputs, found)}


def prepare(folder: Folder, options: Options, adapter: dict[str, Any], force: bool) -> list[str]:
    """Open the model with an adapter once, so that the engines of the TensorRT provider are there; lines to print.

    Raises:
        BundleError: as `OnnxRuntime`.
    """
    ort, _ = _modules()
    cache = cache_of(folder, options, adapter, ort.__version__)
    if force and options.provider == "tensorrt":
        shutil.rmtree(cache, ignore_errors=True)
    start = time.time()
    model = OnnxRuntime(folder, options, adapter)
    if not options.builds:
        return [f"{model.label} needs no engine: nothing to build"]
    names = os.listdir(cache) if os.path.isdir(cache) else []
    size = sum(os.path.getsize(os.path.join(cache, name)) for name in names)
    note = note_of(folder, options)
    return [
        *([f"note: {note}"] if note else []),
        f"engines in {cache}: {size:,} bytes, opened in {time.time() - start:.1f} s",
    ]


def _modules() -> tuple[Any, Any]:
    try:
        import numpy
        import onnxruntime
    except ImportError as error:
        raise BundleError(f"--runtime onnxruntime needs the packages onnxruntime and numpy: {error}") from None
    return onnxruntime, numpy


def _fitted(name: str, value: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor as the model takes it: ONNX Runtime names what it refuses, and neither its input nor what helps."""
    if len(shape) != len(value.shape) or any(size not in (-1, given) for size, given in zip(shape, value.shape)):
        raise BundleError(f"input {name!r} is {list(value.shape)}; the model takes {list(shape)}, -1 being any size")
    try:
        return value.to(dtype)
    except TensorError as error:
        raise BundleError(f"input {name!r} is {value.dtype}; the model takes {dtype}: {error}") from None


def _slot(node: Any) -> tuple[str, tuple[int, ...]]:
    kind = node.type[len("tensor(") : -1]
    return _TYPES.get(kind, kind), tuple(size if isinstance(size, int) else -1 for size in node.shape)
