"""Run an engine: memory that stays where it is, so that a new adapter, or a CUDA graph, finds the same addresses."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Sequence

from . import trt_module
from .adapters import Vectors
from .core.cuda import Cuda
from .core.engine import Context, Engine, RefitWeight, refit
from .core.faults import Fault, known
from .core.messages import Refused
from .folder import BundleError, Folder
from .options import Options
from .tensors import SIZES, Tensor, TensorError
from .trt_build import Plan


class Memory:
    """The memory of one input or output; shape inputs are read by the CPU."""

    def __init__(self, cuda: Cuda, dtype: str, largest: tuple[int, ...], host: bool) -> None:
        self.cuda, self.dtype, self.host = cuda, dtype, host
        size = max(math.prod(largest) * SIZES[dtype], 1)
        self.held: Any  # given back with this object
        if host:
            self.held = (ctypes.c_char * size)()
            self.address = ctypes.addressof(self.held)
        else:
            self.held = cuda.allocate(size)
            self.address = cuda.address(self.held)

    def write(self, data: bytes) -> None:
        """Fill from the start."""
        if self.host:
            ctypes.memmove(self.address, data, len(data))
        elif data:
            self.cuda.copy_in(self.address, data)

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor from the start."""
        size = math.prod(shape) * SIZES[self.dtype]
        data = ctypes.string_at(self.address, size) if self.host else self.cuda.copy_out(self.address, size)
        return Tensor(self.dtype, shape, data)


class TensorRT:
    """The engine of a bundle on the GPU; not for several threads at once.

    Attributes:
        inputs: dtype and shape (-1 where it is dynamic) of each input, vectors included.
        outputs: the same of each output.
        faults: what is known to be wrong in this TensorRT and is in the graph of this model; None if that is not known.
    """

    label = "TensorRT"

    def __init__(
        self,
        folder: Folder,
        options: Options,
        adapter: dict[str, Any],
        watch: Sequence[str] = (),
        content: Any = None,  # an engine that is written nowhere yet, in the place of the one that was built
    ) -> None:
        self.folder = folder
        self.trt = trt_module.load(options.runtime)
        self.log = trt_module.log(self.trt, options)
        self.cuda = Cuda(options.library)
        plan = Plan(folder, self.trt, self.cuda.sm(), adapter, watch)
        self.record = plan.record()
        self.label = f"{options.runtime} {self.trt.__version__}, SM {plan.identity['sm']}"
        self.faults = _faults(folder, options, plan)
        self.engine = Engine(self.trt, self.log, plan.read() if content is None else content)
        self.context = Context(self.engine, self.cuda)
        self.inputs, self.outputs = self.engine.inputs, self.engine.outputs
        self.memory: dict[str, Memory] = {}
        self._reserve()

    def _reserve(self) -> None:
        """Memory for the largest shapes of the profile, once."""
        self.ranges: dict[str, list[tuple[int, ...]]] = {}
        for name, (_, shape) in self.inputs.items():
            if -1 in shape:
                self.ranges[name] = self.engine.range(name)
                self.context.set_shape(name, self.ranges[name][2])
            self._place(name, self.inputs[name][0], self.ranges[name][2] if name in self.ranges else shape)
        for name, (dtype, _) in self.outputs.items():
            shape = self.context.shape(name)
            if -1 in shape:
                raise BundleError(f"the shape of output {name!r} depends on values, which this script does not support")
            self._place(name, dtype, shape)

    def _place(self, name: str, dtype: str, largest: tuple[int, ...]) -> None:
        self.memory[name] = Memory(self.cuda, dtype, largest, self.engine.on_host(name))
        self.context.set_address(name, self.memory[name].address)

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
        if -1 in shape and not self.context.set_shape(name, value.shape):
            raise Refused("shape", self.log, f"{list(value.shape)} of {name!r}")

    def enqueue(self) -> None:
        """Put one run on the stream."""
        self.context.enqueue()

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for inputs; vectors that are inputs stay as `set_vectors` left them."""
        for name, value in inputs.items():
            self.feed(name, value)
        self.enqueue()
        self.cuda.synchronize()
        return {name: self.memory[name].read(self.context.shape(name)) for name in self.outputs}

    def set_vectors(self, vectors: Vectors) -> None:
        """Use other vectors from now on; no run may be under way.

        Raises:
            BundleError: the engine can't take them.
        """
        if self.folder.traits.feeds_vectors:
            for name, vector in vectors.items():
                self.feed(name, vector)
        elif self.folder.traits.refits:
            self._refit(vectors)

    def _refit(self, vectors: Vectors) -> None:
        if not self.engine.refittable:
            raise BundleError("the engine was built without refit: run `build --force`")
        self.cuda.synchronize()
        held = {name: ctypes.create_string_buffer(one.data, len(one.data)) for name, one in vectors.items()}
        weights = {n: RefitWeight(one.dtype, ctypes.addressof(held[n]), one.count) for n, one in vectors.items()}
        refit(self.engine, weights, _no_more)


def _faults(folder: Folder, options: Options, plan: Plan) -> list[Fault] | None:
    model, weak = folder.manifest["model"], folder.manifest["build"]["typing"] == "weak_fp16"
    if options.runtime != "tensorrt" or "graphs" not in model:  # a bundle of an older version
        return None
    half = weak or "float16" in model["dtypes"] or "bfloat16" in model["dtypes"]
    return known(plan.identity["version"], plan.identity["sm"], half, model["graphs"])


def _no_more(names: list[str]) -> dict[str, RefitWeight]:
    """A bundle has the model, but nothing on a device reads it weight by weight."""
    raise BundleError(
        "TensorRT has combined the vectors with other weights and wants those too: "
        f"{', '.join(map(str, names[:10]))}. Make the bundle with swap='input'"
    )
