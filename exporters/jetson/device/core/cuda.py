"""GPU memory and a stream through the CUDA runtime library: no Python module for them is everywhere.

Functions of CUDA 11.4 to 13.  Addresses are plain integers.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from typing import Any

from .messages import EngineError

_NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
_FOLDERS = (
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/aarch64-linux/lib",
    "/usr/local/cuda/targets/sbsa-linux/lib",
)
_TO_DEVICE, _TO_HOST = 1, 2
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, …Minor
_GLOBAL = 0  # cudaStreamCaptureModeGlobal


class Cuda:
    """The CUDA runtime of this machine and one stream.

    Args:
        library: the path of libcudart; None finds it.

    Raises:
        EngineError: there is none, or it reaches no GPU.
    """

    def __init__(self, library: str | None = None) -> None:
        self._lib = _load(library)
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p
        self._lib.cudaGetErrorString.argtypes = [ctypes.c_int]
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, types in {
            "cudaMalloc": [ctypes.POINTER(pointer), size],
            "cudaFree": [pointer],
            "cudaMemcpyAsync": [pointer, pointer, size, ctypes.c_int, pointer],
            "cudaStreamCreate": [ctypes.POINTER(pointer)],
            "cudaStreamSynchronize": [pointer],
            "cudaStreamDestroy": [pointer],
            "cudaDeviceGetAttribute": [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int],
            "cudaStreamBeginCapture": [pointer, ctypes.c_int],
            "cudaStreamEndCapture": [pointer, ctypes.POINTER(pointer)],
            "cudaGraphInstantiateWithFlags": [ctypes.POINTER(pointer), pointer, ctypes.c_ulonglong],
            "cudaGraphLaunch": [pointer, pointer],
        }.items():
            if (function := getattr(self._lib, name, None)) is None:
                raise EngineError(f"{self._lib._name} has no {name}: CUDA 11.4 (JetPack 5) or newer is needed")
            function.argtypes = types
        stream = pointer()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = int(stream.value or 0)

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self._lib.cudaStreamDestroy(self.stream)

    def allocate(self, size: int) -> Allocation:
        """Device memory of at least one byte, given back with the object that is returned."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), max(size, 1))
        return Allocation(self._lib, int(address.value or 0))

    def address(self, buffer: Allocation) -> int:
        """Where memory is."""
        return buffer.address

    def copy_in(self, address: int, data: Any) -> None:
        """Copy bytes to the device, in the order of the stream; they may be changed when this returns."""
        buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
        self._call("cudaMemcpyAsync", address, ctypes.addressof(buffer), len(data), _TO_DEVICE, self.stream)
        self.synchronize()

    def copy_out(self, address: int, size: int) -> bytes:
        """Copy bytes from the device, after all work of the stream."""
        buffer = (ctypes.c_char * size)()
        self._call("cudaMemcpyAsync", ctypes.addressof(buffer), address, size, _TO_HOST, self.stream)
        self.synchronize()
        return bytes(buffer)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def sm(self) -> str:
        """The compute capability of the device, "8.7"."""
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            parts.append(str(value.value))
        return ".".join(parts)

    def capture(self, work: Any) -> int:
        """Record what `work` puts on the stream as a graph, for `launch`."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", self.stream, _GLOBAL)
        try:
            work()
        finally:
            self._call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        return int(executable.value or 0)

    def launch(self, graph: int) -> None:
        """Put a recorded graph on the stream."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            text = (self._lib.cudaGetErrorString(code) or b"").decode()
            more = ": is this the device, and does a container run with --runtime nvidia?" if code in (35, 100) else ""
            raise EngineError(f"CUDA: {name} failed with error {code} ({text}){more}")


class Allocation:
    """Device memory."""

    def __init__(self, lib: Any, address: int) -> None:
        self.address = address
        self._lib = lib

    def __del__(self) -> None:
        self._lib.cudaFree(self.address)  # a failure here is one of the work before, which has said so


def _load(library: str | None) -> ctypes.CDLL:
    tried: list[str] = []
    places = [*_FOLDERS, *(os.path.join(one, "nvidia", "*", "lib") for one in sys.path)]  # the latter of PyPI
    found = [path for place in places for path in sorted(glob.glob(os.path.join(place, "libcudart.so*")))]
    for name in [library] if library else [*_NAMES, *found]:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            tried.append(f"{name}: {error}")
    raise EngineError(
        "the CUDA runtime (libcudart.so) was not found; on JetPack: sudo apt install cuda-cudart-*, elsewhere: pip "
        "install nvidia-cuda-runtime-cu12; or set LD_LIBRARY_PATH to its folder. Tried:\n  " + "\n  ".join(tried[:6])
    )
