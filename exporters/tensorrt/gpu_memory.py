"""GPU memory for engines: through PyTorch where it has CUDA, else through the CUDA runtime library.

A Jetson often has PyTorch without CUDA, or NVIDIA's of another Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from onelora_compile.errors import ConfigError, ExportError, StateError
from onelora_compile.exporters.jetson.device.core.cuda import Allocation, Cuda
from onelora_compile.exporters.jetson.device.core.messages import EngineError

ALIGNMENT = 256  # bytes, of every address that an engine gets

Array = np.ndarray | torch.Tensor


def device_memory(which: str = "auto") -> DeviceMemory:
    """The memory of the current GPU.

    Args:
        which: "torch", "cuda", or "auto": the first of the two that has a GPU.

    Raises:
        StateError: neither has a GPU; the message says why.
        ConfigError: an unknown name.
    """
    if which not in ("auto", "torch", "cuda"):
        raise ConfigError(f"memory={which!r} is not one of 'auto', 'torch', 'cuda'")
    reasons = []
    if which != "cuda":
        if torch.cuda.is_available():
            return TorchMemory(torch.device("cuda", torch.cuda.current_device()))
        built = torch.version.cuda
        reasons.append(f"PyTorch {torch.__version__} {'finds no GPU' if built else 'is built without CUDA'}")
    if which != "torch":
        try:
            return CudaMemory()
        except (EngineError, ExportError) as error:
            reasons.append(str(error).partition(" Tried:")[0])
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


class CudaMemory(Cuda):
    """Memory of the CUDA runtime library, without PyTorch.

    Raises:
        EngineError: there is no such library.
        ExportError: it finds no GPU.
    """

    def upload(self, buffer: Allocation, offset: int, array: Array) -> None:
        """Copy from the host, and wait: the array may be gone afterwards."""
        if not isinstance(array, torch.Tensor):
            array = torch.from_numpy(np.ascontiguousarray(array))
        raw = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.copy_in(buffer.address + offset, raw.numpy())

    def download(self, buffer: Allocation, size: int) -> torch.Tensor:
        """A copy on the host."""
        return torch.from_numpy(np.frombuffer(bytearray(self.copy_out(buffer.address, size)), np.uint8))

    def target(self) -> str:
        """By the driver's word."""
        return "sm_" + self.sm().replace(".", "")

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            super()._call(name, *arguments)
        except EngineError as error:
            raise ExportError(str(error)) from error


DeviceMemory = TorchMemory | CudaMemory
