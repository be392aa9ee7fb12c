"""GPU memory for engines: through PyTorch where it has CUDA, else through cuda-python.

A Jetson often has PyTorch without CUDA, or NVIDIA's of another Python; cuda-python is 8 MB there.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
import torch

from onelora_compile.errors import ConfigError, ExportError, StateError

ALIGNMENT = 256  # bytes, of every address that an engine gets

Array = np.ndarray | torch.Tensor


class Memory(Protocol):
    """Allocates, copies and waits on one stream of one device."""

    stream: int

    def allocate(self, size: int) -> Any:
        """A buffer of at least `size` bytes, which lives as long as the object that is returned."""

    def address(self, buffer: Any) -> int:
        """Where a buffer is."""

    def upload(self, buffer: Any, offset: int, array: Array) -> None:
        """Copy a contiguous array into a buffer, in place: its address stays."""

    def download(self, buffer: Any, size: int) -> torch.Tensor:
        """The first bytes of a buffer, uint8 [size]; on the device if that is PyTorch's, else on the host."""

    def synchronize(self) -> None:
        """Wait for what is on the stream."""

    def target(self) -> str:
        """The device: "sm_86"."""


def device_memory(which: str = "auto") -> Memory:
    """The memory of the current GPU.

    Args:
        which: "torch", "cuda-python", or "auto": the first of the two that has a GPU.

    Raises:
        StateError: neither has a GPU; the message says why.
        ConfigError: an unknown name.
    """
    if which not in ("auto", "torch", "cuda-python"):
        raise ConfigError(f"memory={which!r} is not one of 'auto', 'torch', 'cuda-python'")
    reasons = []
    if which != "cuda-python":
        if torch.cuda.is_available():
            return TorchMemory(torch.device("cuda", torch.cuda.current_device()))
        built = torch.version.cuda
        reasons.append(f"PyTorch {torch.__version__} {'finds no GPU' if built else 'is built without CUDA'}")
    if which != "torch":
        try:
            return CudaMemory()
        except (ImportError, ExportError) as error:
            reasons.append(f"cuda-python: {error}")
    raise StateError(f"engines run on a GPU, and there is none here ({'; '.join(reasons)})")


class TorchMemory:
    """Memory of PyTorch's allocator.

    Args:
        device: where; "cpu" works too, for what needs no engine.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stream = 0 if self._stream is None else int(self._stream.cuda_stream)

    def allocate(self, size: int) -> torch.Tensor:
        """Uint8 [size]; PyTorch aligns to 512 bytes on a GPU."""
        return torch.empty(max(1, size), dtype=torch.uint8, device=self.device)

    def address(self, buffer: torch.Tensor) -> int:
        """The address of the first byte."""
        return buffer.data_ptr()

    def upload(self, buffer: torch.Tensor, offset: int, array: Array) -> None:
        """Copy on the engine's stream, after what the caller's stream is doing."""
        source = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))
        raw = source.detach().contiguous().reshape(-1).view(torch.uint8)
        with self._on_stream():
            buffer[offset : offset + raw.numel()].copy_(raw)

    def download(self, buffer: torch.Tensor, size: int) -> torch.Tensor:
        """A copy, on the device."""
        with self._on_stream():
            copied = buffer[:size].clone()
        self.synchronize()
        return copied

    def synchronize(self) -> None:
        """Wait for the engine's stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def target(self) -> str:
        """By PyTorch's word."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    def _on_stream(self) -> Any:
        if self._stream is not None and not torch.cuda.is_current_stream_capturing():
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


class CudaMemory:
    """Memory of the CUDA runtime, through cuda-python.

    Raises:
        ImportError: it is not installed.
        ExportError: it finds no GPU.
    """

    def __init__(self) -> None:
        try:
            self._cudart: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            self._cudart = importlib.import_module("cuda.cudart")  # before cuda-python 12.8
        self._call("cudaFree", 0)  # makes the context, or says why there is none
        self.stream = int(self._call("cudaStreamCreate"))

    def allocate(self, size: int) -> _Allocation:
        """Device memory that is freed with the object."""
        return _Allocation(self, int(self._call("cudaMalloc", max(1, size))))

    def address(self, buffer: _Allocation) -> int:
        """The device pointer."""
        return buffer.pointer

    def upload(self, buffer: _Allocation, offset: int, array: Array) -> None:
        """Copy from the host, and wait: the array may be gone afterwards."""
        raw = _host_bytes(array)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", buffer.pointer + offset, raw.ctypes.data, raw.nbytes, kind, self.stream)
        self.synchronize()

    def download(self, buffer: _Allocation, size: int) -> torch.Tensor:
        """A copy on the host."""
        raw = np.empty(size, np.uint8)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", raw.ctypes.data, buffer.pointer, size, kind, self.stream)
        self.synchronize()
        return torch.from_numpy(raw)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def target(self) -> str:
        """By the driver's word."""
        device = self._call("cudaGetDevice")
        kinds = self._cudart.cudaDeviceAttr
        parts = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        return "sm_{}{}".format(*(self._call("cudaDeviceGetAttribute", part, device) for part in parts))

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self._call("cudaFree", pointer)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cudart, name)(*arguments)
        if int(status):
            raise ExportError(f"{name}: {getattr(status, 'name', status)}")
        return results[0] if results else None


class _Allocation:
    """Device memory."""

    def __init__(self, memory: CudaMemory, pointer: int) -> None:
        self.pointer = pointer
        self._memory = memory

    def __del__(self) -> None:
        self._memory.free(self.pointer)


def _host_bytes(array: Array) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
