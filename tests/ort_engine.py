"""ONNX Runtime in the place of an engine: the calls of TensorRT's runtime that EngineRunner and refit_engine make.

It shows that our side feeds, swaps and reads the right bytes at the right addresses, on the CPU.  It shows nothing of
TensorRT.  Every method here is one that the recorded bindings have in all versions.
"""

import ctypes

import numpy as np
import onnxruntime


class Engine:
    """An engine of a model's file; `weights` are refittable values, kept in the bytes of the plan."""

    def __init__(self, path, manifest, weights=None):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.manifest = manifest
        self.weights = dict(weights or {})
        self.refittable = manifest.mode == "refit"

    def create_execution_context(self):
        return Context(self)

    def serialize(self):
        return b"".join(value.tobytes() for _, value in sorted(self.weights.items()))


class Context:
    """Reads inputs at their addresses, runs, and writes outputs to theirs."""

    def __init__(self, engine):
        self.engine = engine
        self.addresses, self.shapes = {}, {}
        self.launches = 0

    def set_input_shape(self, name, shape):
        for profile in self.engine.manifest.profiles:
            low, _, high = profile.get(name, (shape, shape, shape))
            if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        outputs = self._run({one: np.zeros(shape, self._dtype(one)) for one, shape in self.shapes.items()})
        return outputs[name].shape

    def execute_async_v3(self, stream):
        assert isinstance(stream, int)
        self.launches += 1
        given = {name: self._read(name) for name in (one.name for one in self.engine.manifest.inputs)}
        for name, value in self._run(given).items():
            ctypes.memmove(self.addresses[name], value.tobytes(), value.nbytes)
        return True

    def _run(self, given):
        held = {name: value for name, value in self.engine.weights.items() if name in self._names()}
        names = [one.name for one in self.engine.session.get_outputs()]
        return dict(zip(names, self.engine.session.run(names, held | given), strict=True))

    def _names(self):
        own = self.engine.session.get_inputs() + self.engine.session.get_overridable_initializers()
        return {one.name for one in own}

    def _dtype(self, name):
        kinds = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
        return kinds[next(one.dtype for one in self.engine.manifest.inputs if one.name == name)]

    def _read(self, name):
        shape = self.shapes.get(name) or self.engine.manifest.vectors[name]
        value = np.empty(shape, self._dtype(name))
        ctypes.memmove(value.ctypes.data, self.addresses[name], value.nbytes)
        return value


class Refitter:
    """Takes weights by name; with `merged`, vectors that were merged with other weights, whose values it wants too."""

    merged = {}

    def __init__(self, engine, logger):
        self.engine, self.given = engine, {}

    def set_named_weights(self, name, weights):
        if name in self.engine.manifest.vectors and weights.dtype != np.float32:
            return False
        self.given[name] = weights
        return True

    def get_missing_weights(self):
        return [other for name, other in self.merged.items() if name in self.given and other not in self.given]

    def refit_cuda_engine(self):
        if self.get_missing_weights():
            return False
        self.engine.weights |= {name: self.given[name].copy() for name in self.engine.manifest.vectors}
        return True
