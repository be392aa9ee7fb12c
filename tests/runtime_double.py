"""The runtime's side of tensorrt_double.py: ONNX Runtime reads and writes at the addresses that it is given."""

import base64
import ctypes
import json
import types
from typing import Any

import numpy as np
import onnx
import onnxruntime
from builder_double import dtype_of, shape_of


def runtime_side(real, faults, checked):
    """The classes and functions that a program calls itself, by name, and how to make `Weights`."""
    places: dict[int, tuple[Any, ...]] = {}

    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, content):
            return checked("ICudaEngine", Engine(json.loads(bytes(content))))

    class Engine:
        def __init__(self, plan):
            self.plan = plan
            self.model = onnx.load_model_from_string(base64.b64decode(plan["model"]))
            constants = {tensor.name for tensor in self.model.graph.initializer}
            self.inputs = {value.name for value in self.model.graph.input} - constants
            values = [*self.model.graph.input, *self.model.graph.output]
            self.slots = {value.name: value for value in values if value.name not in constants}
            self.open()

        def open(self):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)

        def replace(self, values):
            for tensor in self.model.graph.initializer:
                if tensor.name in values:
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
            self.open()

        def serialize(self):
            if faults.get("stale"):  # written as it was built
                return json.dumps(self.plan).encode()
            model = base64.b64encode(self.model.SerializeToString()).decode()
            return json.dumps({**self.plan, "model": model}).encode()

        def create_serialization_config(self):
            return checked("ISerializationConfig", types.SimpleNamespace(set_flag=lambda flag: True))

        def serialize_with_config(self, config):
            return self.serialize()

        @property
        def num_io_tensors(self):
            return len(self.slots)

        @property
        def refittable(self):
            return bool(self.plan["marked"])

        def get_tensor_name(self, index):
            return list(self.slots)[index]

        def get_tensor_mode(self, name):
            return real.TensorIOMode.INPUT if name in self.inputs else real.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return dtype_of(real, self.slots[name])

        def get_tensor_shape(self, name):
            return shape_of(self.slots[name])

        def get_tensor_profile_shape(self, name, profile):
            return [tuple(shape) for shape in self.plan["ranges"][name]]

        def get_tensor_location(self, name):
            return real.TensorLocation.DEVICE

        def create_execution_context(self):
            return checked("IExecutionContext", Context(self))

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses = engine, {}, {}

        def set_input_shape(self, name, shape):
            low, _, high = self.engine.plan["ranges"].get(name, [shape_of(self.engine.slots[name])] * 3)
            self.shapes[name] = shape
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def get_tensor_shape(self, name):
            if name in self.shapes:
                return self.shapes[name]
            batch = next(iter(self.shapes.values()), (1,))[0]
            return tuple(batch if size == -1 else size for size in shape_of(self.engine.slots[name]))

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return bool(address)

        def execute_async_v3(self, stream):
            feed = {}
            for value in self.engine.session.get_inputs():
                dtype = real.nptype(self.engine.get_tensor_dtype(value.name))
                found = read(self.addresses[value.name], self.get_tensor_shape(value.name), dtype)
                feed[value.name] = found.astype(np.int64 if value.type == "tensor(int64)" else dtype)
            names = [value.name for value in self.engine.session.get_outputs()]
            for name, result in zip(names, self.engine.session.run(None, feed), strict=True):
                raw = result.astype(real.nptype(self.engine.get_tensor_dtype(name))).tobytes()
                assert result.shape == self.get_tensor_shape(name)
                ctypes.memmove(self.addresses[name], raw, len(raw))
            return stream == faults.get("stream", 7)

    class Refitter:
        def __init__(self, engine, log):
            self.engine, self.found = engine._double, {}

        def set_named_weights(self, name, weights):
            known = name in self.engine.plan["marked"] or name == faults.get("missing")
            if known:
                self.found[name] = weights
            return known

        def get_missing_weights(self):
            return [faults["missing"]] if faults.get("missing", "") not in ("", *self.found) else []

        def refit_cuda_engine(self):
            values = {}
            for name, weights in self.found.items():
                _, dtype, address, count = places[id(weights)]
                values[name] = read(address, (count,), real.nptype(dtype))
            shapes = {tensor.name: tuple(tensor.dims) for tensor in self.engine.model.graph.initializer}
            self.engine.replace({name: value.reshape(shapes[name]) for name, value in values.items()})
            return True

    def weights(dtype, address, count):
        # Weights.numpy() of the 10.3 and 10.13 bindings has strides of zero with NumPy 2: the address is read instead.
        one = real.Weights(dtype, address, count)
        assert one.size == count
        places[id(one)] = (one, dtype, address, count)
        return one

    return {"Runtime": Runtime, "Refitter": Refitter}, weights


def read(address, shape, dtype):
    """The numbers at an address."""
    raw = ctypes.string_at(address, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(raw, dtype).reshape(shape).copy()
