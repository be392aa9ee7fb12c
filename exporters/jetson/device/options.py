"""Choices of one run of the script, each with the default for a small device."""

from __future__ import annotations

from typing import NamedTuple

from .core.modes import Mode

RUNTIMES = ("tensorrt", "tensorrt_rtx", "onnxruntime")
PROVIDERS = ("cpu", "cuda", "tensorrt")


class Options(NamedTuple):
    """How to build and run.

    Attributes:
        runtime: "tensorrt" (JetPack's), "tensorrt_rtx" (NVIDIA's for desktop GPUs), or "onnxruntime".
        provider: of ONNX Runtime: "cpu", "cuda" or "tensorrt".
        workspace_mib: memory that the builder may give to one kernel; None is the bundle's choice.
        optimization_level: 0 to 5, how long the builder searches; None is the bundle's choice.
        tf32: float32 products with 10 bits of mantissa, TensorRT's default.
        sm: GPU to build for, "86"; for tensorrt_rtx alone, which builds for a GPU that is not there.
        library: path of libcudart; None finds it.
        verbose: show the runtime's own messages.
    """

    runtime: str = "tensorrt"
    workspace_mib: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    sm: str | None = None
    library: str | None = None
    verbose: bool = False
    provider: str = "cpu"

    @property
    def builds(self) -> bool:
        """Whether there are engines at all."""
        return self.runtime != "onnxruntime" or self.provider == "tensorrt"

    def engine_each(self, mode: Mode) -> bool:
        """Whether each adapter has an engine of its own: another one takes as long as a build."""
        if self.runtime == "onnxruntime":
            return self.provider == "tensorrt" and (mode.rebuilds or mode.refits)
        return mode.rebuilds
