"""A finished engine: loaded, run in buffers that stay where they are, its vectors replaced."""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple, Sequence

from .logger import made
from .messages import Refused

# TensorRT's names of the dtypes of inputs and outputs, and everybody else's.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class Engine:
    """An engine in memory.

    Args:
        trt: the module.
        log: its logger.
        plan: the engine's bytes.

    Attributes:
        inputs: dtype and shape (-1 where it is dynamic) of each input.
        outputs: the same of each output.

    Raises:
        Refused: TensorRT can't load it.
    """

    def __init__(self, trt: Any, log: Any, plan: bytes) -> None:
        self.trt, self.log = trt, log
        self.runtime: Any = made(trt, log, "runtime", trt.Runtime)
        self.loaded: Any = self.runtime.deserialize_cuda_engine(plan)
        if self.loaded is None:
            raise Refused("load", log)
        self.inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        loaded = self.loaded
        for index in range(loaded.num_io_tensors):
            name = loaded.get_tensor_name(index)
            dtype = loaded.get_tensor_dtype(name).name
            known = (DTYPES.get(dtype, dtype), tuple(loaded.get_tensor_shape(name)))
            is_input = loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = known

    @property
    def refittable(self) -> bool:
        """Whether it was built to be refitted."""
        return bool(self.loaded.refittable)

    def serialized(self) -> Any:
        """The engine's bytes, with the weights that it has by now.

        Raises:
            Refused: TensorRT can't write it.
        """
        plan = self.loaded.serialize()
        if plan is None:
            raise Refused("write", self.log)
        return plan

    def range(self, name: str) -> list[tuple[int, ...]]:
        """(smallest, usual, largest) shape of a dynamic input in the first profile."""
        return [tuple(shape) for shape in self.loaded.get_tensor_profile_shape(name, 0)]

    def on_host(self, name: str) -> bool:
        """Whether an input or output is in the memory of the CPU, as what holds shapes is."""
        return bool(self.loaded.get_tensor_location(name) == self.trt.TensorLocation.HOST)


class Context:
    """An execution context and its buffers, which keep their addresses while they are large enough.

    A CUDA graph that captured `enqueue` finds them there.  For one thread at a time.

    Args:
        engine: several contexts may share it.
        memory: has `stream`, `allocate(size)`, whose result lives as long as its memory, and `address(buffer)`.
        profile: number of the optimization profile.

    Raises:
        Refused: there is no room, or no such profile.
    """

    def __init__(self, engine: Engine, memory: Any, profile: int = 0) -> None:
        self.engine, self.memory, self.log = engine, memory, engine.log
        self.context: Any = engine.loaded.create_execution_context()
        if self.context is None:
            raise Refused("context", self.log)
        if profile and not self.context.set_optimization_profile_async(profile, memory.stream):
            raise Refused("profile", self.log, str(profile))
        self._buffers: dict[str, tuple[int, Any]] = {}

    def buffer(self, name: str, size: int) -> Any:
        """The buffer of an input or output, of at least `size` bytes."""
        held, buffer = self._buffers.get(name, (-1, None))
        if held < size:
            buffer = self.memory.allocate(size)
            self._buffers[name] = (size, buffer)
            self.set_address(name, self.memory.address(buffer))
        return buffer

    def set_address(self, name: str, address: int) -> None:
        """Let an input or output be at an address, which the caller keeps."""
        if not self.context.set_tensor_address(name, address):
            raise Refused("address", self.log, name)

    def set_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Set the shape of an input for the calls that follow; returns whether it is within the profile."""
        return bool(self.context.set_input_shape(name, tuple(shape)))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output, or of an input, by the shapes that were set; -1 where it depends on values."""
        return tuple(self.context.get_tensor_shape(name))

    def enqueue(self, stream: int | None = None) -> None:
        """Put one run on a stream, the memory's own by default, and return at once."""
        if not self.context.execute_async_v3(self.memory.stream if stream is None else stream):
            raise Refused("run", self.log)


class RefitWeight(NamedTuple):
    """Numbers somewhere in memory: a value of `DTYPES`, the address, which the caller keeps, and how many."""

    dtype: str
    address: int
    size: int


def refit(
    engine: Engine, vectors: Mapping[str, RefitWeight], more: Callable[[list[str]], Mapping[str, RefitWeight]]
) -> list[str]:
    """Set the vectors of a loaded engine to values, never by a difference: what was there before does not matter.

    Contexts stay valid, and must be idle.

    Args:
        engine: built to be refitted.
        vectors: all of them, by name.
        more: gives other weights, which TensorRT merged with vectors and asks for by name; or raises.

    Returns:
        The names that `more` was asked for.

    Raises:
        Refused: the engine may then be half changed and must not be used.
    """
    refitter = engine.trt.Refitter(engine.loaded, engine.log)
    _set(engine, refitter, "vector", vectors)
    asked = [name for name in refitter.get_missing_weights() if name not in vectors]
    if asked:
        _set(engine, refitter, "weight", more(asked))
        if left := refitter.get_missing_weights():
            raise Refused("missing", engine.log, ", ".join(left))
    if not refitter.refit_cuda_engine():
        raise Refused("refit", engine.log)
    return asked


def _set(engine: Engine, refitter: Any, step: str, weights: Mapping[str, RefitWeight]) -> None:
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    for name, one in weights.items():
        dtype = getattr(engine.trt.DataType, names[one.dtype])
        if not refitter.set_named_weights(name, engine.trt.Weights(dtype, one.address, one.size)):
            raise Refused(step, engine.log, name)
