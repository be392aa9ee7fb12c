"""The bundle's model in ONNX Runtime: for the workstation, before the bundle is copied.

It runs the same files by the same steps, so it finds a damaged bundle, a wrong adapter or a mistake in feeding it.  It
says nothing about TensorRT: not whether it takes the model, nor how fast or how exact it is there.
"""

from __future__ import annotations

from typing import Any

from .adapters import Vectors
from .folder import BundleError, Folder
from .options import Options
from .tensors import Tensor

_TYPES = {"float": "float32", "double": "float64"}


class OnnxRuntime:
    """As `TensorRT` of trt_run.py, on the CPU."""

    label = "ONNX Runtime"
    faults = None

    def __init__(self, folder: Folder, options: Options, adapter: dict[str, Any]) -> None:
        try:
            import numpy
            import onnxruntime
        except ImportError as error:
            raise BundleError(f"--runtime onnxruntime needs the packages onnxruntime and numpy: {error}") from None
        self.folder, self.ort, self.numpy = folder, onnxruntime, numpy
        self.label = f"ONNX Runtime {onnxruntime.__version__} on the CPU (not TensorRT)"
        self.record: dict[str, Any] = {"notes": []}
        self.vectors: dict[str, Any] = {}
        self._open()

    def _open(self) -> None:
        options = self.ort.SessionOptions()
        options.log_severity_level = 4
        if self.vectors and not self.folder.traits.feeds_vectors:
            values = [self.ort.OrtValue.ortvalue_from_numpy(value) for value in self.vectors.values()]
            options.add_external_initializers(list(self.vectors), values)
        path = self.folder.file(self.folder.manifest["model"]["file"])
        try:
            self.session = self.ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base
            raise BundleError(f"ONNX Runtime can't load {path}: {error}") from None
        self.inputs = {node.name: _slot(node) for node in self.session.get_inputs()}
        self.outputs = {node.name: _slot(node) for node in self.session.get_outputs()}

    def set_vectors(self, vectors: Vectors) -> None:
        """Use other vectors from now on."""
        self.vectors = {name: vector.numpy() for name, vector in vectors.items()}
        if not self.folder.traits.feeds_vectors:
            self._open()

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for inputs."""
        feed = {name: value.to(self.inputs[name][0]).numpy() for name, value in inputs.items()}
        if self.folder.traits.feeds_vectors:
            feed.update(self.vectors)
        try:
            found = self.session.run(None, feed)
        except Exception as error:  # see above
            raise BundleError(f"ONNX Runtime can't run the model: {error}") from None
        return {name: Tensor.of(self.numpy.asarray(value)) for name, value in zip(self.outputs, found)}


def _slot(node: Any) -> tuple[str, tuple[int, ...]]:
    kind = node.type[len("tensor(") : -1]
    return _TYPES.get(kind, kind), tuple(size if isinstance(size, int) else -1 for size in node.shape)
