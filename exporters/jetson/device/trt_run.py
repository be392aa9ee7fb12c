"""Run an engine: memory that stays where it is, so that a new adapter, or a CUDA graph, finds the same addresses."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from . import trt_module
from .adapters import Vectors
from .core.messages import Refused
from .cuda import Cuda
from .folder import BundleError, Folder
from .options import Options
from .tensors import SIZES, Tensor, TensorError
from .trt_build import Plan

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class Memory:
    """The memory of one input or output; shape inputs are read by the CPU."""

    def __init__(self, cuda: Cuda, dtype: str, largest: tuple[int, ...], host: bool) -> None:
        self.cuda, self.dtype, self.host = cuda, dtype, host
        size = max(math.prod(largest) * SIZES[dtype], 1)
        self.buffer = (ctypes.c_char * size)() if host else None
        self.address = ctypes.addressof(self.buffer) if self.buffer is not None else cuda.malloc(size)

    def write(self, data: bytes) -> None:
        """Fill from the start."""
        if self.host:
            ctypes.memmove(self.address, data, len(data))
        elif data:
            self.cuda.upload(self.address, data)

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor from the start."""
        size = math.prod(shape) * SIZES[self.dtype]
        data = ctypes.string_at(self.address, size) if self.host else self.cuda.download(self.address, size)
        return Tensor(self.dtype, shape, data)


class TensorRT:
    """The engine of a bundle on the GPU; not for several threads at once.

    Attributes:
        inputs: dtype and shape (-1 where it is dynamic) of each input, vectors included.
        outputs: the same of each output.
    """

    label = "TensorRT"

    def __init__(self, folder: Folder, options: Options, adapter: dict[str, Any]) -> None:
        self.folder = folder
        self.trt = trt_module.load(options.runtime)
        self.log = trt_module.log(self.trt, options)
        self.cuda = Cuda(options.library)
        plan = Plan(folder, self.trt, self.cuda.sm(), adapter)
        self.record = plan.record()
        self.label = f"{options.runtime} {self.trt.__version__}, SM {plan.identity['sm']}"
        if hasattr(self.trt, "init_libnvinfer_plugins"):
            self.trt.init_libnvinfer_plugins(self.log, "")
        self.runtime = self.trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(plan.read())
        if self.engine is None:
            raise Refused("load", self.log)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise Refused("context", self.log)
        self.inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            known = (_DTYPES[self.engine.get_tensor_dtype(name).name], tuple(self.engine.get_tensor_shape(name)))
            is_input = self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = known
        self.memory: dict[str, Memory] = {}
        self._reserve()

    def _reserve(self) -> None:
        """Memory for the largest shapes of the profile, once."""
        self.ranges: dict[str, list[tuple[int, ...]]] = {}
        for name, (_, shape) in self.inputs.items():
            if -1 in shape:
                self.ranges[name] = [tuple(one) for one in self.engine.get_tensor_profile_shape(name, 0)]
                self.context.set_input_shape(name, self.ranges[name][2])
            self._place(name, self.inputs[name][0], self.ranges[name][2] if name in self.ranges else shape)
        for name, (dtype, _) in self.outputs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            if -1 in shape:
                raise BundleError(f"the shape of output {name!r} depends on values, which this script does not support")
            self._place(name, dtype, shape)

    def _place(self, name: str, dtype: str, largest: tuple[int, ...]) -> None:
        host = self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST
        self.memory[name] = Memory(self.cuda, dtype, largest, host)
        if not self.context.set_tensor_address(name, self.memory[name].address):
            raise Refused("address", self.log, name)

    def feed(self, name: str, value: Tensor) -> None:
        """Copy a tensor into the memory of an input and set its shape.

        Raises:
            BundleError: a shape outside of the profile, or a dtype that the engine does not take.
        """
        dtype, shape = self.inputs[name]
        low, high = (self.ranges[name][0], self.ranges[name][2]) if name in self.ranges else (shape, shape)
        fits = len(value.shape) == len(shape) and all(a <= s <= b for a, s, b in zip(low, value.shape, high))
        if not fits:
            wanted = f"{list(low)} to {list(high)}" if low != high else str(list(shape))
            raise BundleError(f"input {name!r} is {list(value.shape)}; the engine takes {wanted}")
        try:
            self.memory[name].write(value.to(dtype).data)
        except TensorError as error:
            raise BundleError(f"input {name!r}: {error}") from None
        if -1 in shape and not self.context.set_input_shape(name, value.shape):
            raise Refused("shape", self.log, f"{list(value.shape)} of {name!r}")

    def enqueue(self) -> None:
        """Put one run on the stream."""
        if not self.context.execute_async_v3(self.cuda.stream):
            raise Refused("run", self.log)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for inputs; vectors that are inputs stay as `set_vectors` left them."""
        for name, value in inputs.items():
            self.feed(name, value)
        self.enqueue()
        self.cuda.synchronize()
        return {name: self.memory[name].read(tuple(self.context.get_tensor_shape(name))) for name in self.outputs}

    def set_vectors(self, vectors: Vectors) -> None:
        """Use other vectors from now on; no run may be under way.

        Raises:
            BundleError: the engine can't take them.
        """
        if self.folder.mode == "input":
            for name, vector in vectors.items():
                self.feed(name, vector)
        elif self.folder.mode == "refit":
            self._refit(vectors)

    def _refit(self, vectors: Vectors) -> None:
        """Absolute values, never differences: what was there before does not matter."""
        if not self.engine.refittable:
            raise BundleError("the engine was built without refit: run `build --force`")
        self.cuda.synchronize()
        refitter = self.trt.Refitter(self.engine, self.log)
        alive = []  # TensorRT reads the memory when it refits
        for name, vector in vectors.items():
            buffer = ctypes.create_string_buffer(vector.data, len(vector.data))
            alive.append(buffer)
            weights = self.trt.Weights(self.trt.DataType.FLOAT, ctypes.addressof(buffer), vector.count)
            if not refitter.set_named_weights(name, weights):
                raise Refused("vector", self.log, name)
        if missing := list(refitter.get_missing_weights()):
            raise BundleError(
                "TensorRT has combined the vectors with other weights and wants those too: "
                f"{', '.join(map(str, missing[:10]))}. Make the bundle with swap='input'"
            )
        if not refitter.refit_cuda_engine():
            raise Refused("refit", self.log)
        del alive
