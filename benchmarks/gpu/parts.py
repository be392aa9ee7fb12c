"""The parts of a run: what each needs, and how long it may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of this folder.

    Attributes:
        module: its dotted name; its `rows(device, small)` yields what it measures.
        seconds: after which it is stopped; what it has measured is kept.
        needs: what has to be importable; any one of a tuple.
        cuda: whether it has no meaning on a CPU.
    """

    module: str
    seconds: int
    needs: tuple[str | tuple[str, ...], ...] = ()
    cuda: bool = False

    @property
    def name(self) -> str:
        """What rows call it."""
        return self.module.rpartition(".")[2]


# What matters most first: the time may run out.
PARTS = (
    Part("gpu.swaps", 60),
    Part("gpu.training", 150),
    Part("gpu.lowerings", 150),
    Part("gpu.engines", 120, ("onnx", "onnxruntime", ("tensorrt", "tensorrt_rtx")), cuda=True),
    Part("gpu.onnx_cuda", 45, ("onnx", "onnxruntime")),
    Part("gpu.gpu_tests", 120, ("pytest",)),
)
