"""The clock behind a measured choice: one forward and backward of an adapted linear on a GPU.

`producer_consumer` is timed as the frozen linear plus the passes that Inductor can't put into a neighbour's kernel: the
vector's gradient, and, beside attention and matmuls, the sum, the update and their gradients.  What it can fuse counts
as free, so the comparison leans towards it.  Not run on any GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onelora_compile.dynamo.private_api import outside_of_modes
from onelora_compile.ops import add_rank1, feature_sum
from onelora_compile.passes.lowerings.lowering import Shape


def measure_on_gpu(shape: Shape, name: str, device: str) -> float:
    """Seconds of one forward and backward by one lowering, the median of repeated runs with a cold L2 cache.

    Raises: ArithmeticError for a lowering that computes something else on this GPU; KeyError for one without a clock.
    """
    import triton.testing

    with outside_of_modes(), torch.no_grad():
        tensors = Tensors(shape, device)
        if name in CHECKED:
            CHECKED[name](shape, tensors)
        run = CLOCKED[name](shape, tensors)
        milliseconds: Any = triton.testing.do_bench(run, return_mode="median")
    return float(milliseconds) / 1e3


class Tensors:
    """Random values of one shape; from a generator of their own, so that the user's random numbers stay."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def make(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.randn(*sizes, device=device, generator=generator).to(dtype)

        m, k, n = shape.rows, shape.in_features, shape.out_features
        self.x, self.w, self.g, self.s = make(m, k), make(n, k), make(m, n), make(m, 1, dtype=torch.float32)
        self.c = make(n) if shape.bias else None
        self.b = make(n, dtype=shape.vector_dtype)


def _producer_consumer(shape: Shape, t: Tensors) -> Callable[[], object]:
    def run() -> None:
        y = F.linear(t.x, t.w, t.c)
        if shape.sum_apart:
            feature_sum(t.x)
        if shape.update_apart:
            add_rank1(y, t.s, t.b)
        t.s.to(t.g.dtype).T @ t.g  # one read of g, as Inductor's reduction
        if shape.trains_input:
            gx = t.g @ t.w
            gs = t.g @ t.b.to(t.g.dtype) if shape.update_apart else t.s[:, 0]
            if shape.sum_apart:
                gx += gs[:, None]

    return run


def _fused_kernel(shape: Shape, t: Tensors) -> Callable[[], object]:
    from onelora_compile.kernels.rank1_linear import rank1_linear, rank1_linear_backward

    def run() -> None:
        rank1_linear(t.x, t.w, t.c, t.b)
        if shape.trains_input:
            rank1_linear_backward(t.g, t.s, t.w, t.b)
        else:
            t.s.to(t.g.dtype).T @ t.g

    return run


def check_fused_kernel(shape: Shape, t: Tensors) -> None:
    """Whether the kernel computes here what PyTorch does: compilers and drivers differ from GPU to GPU.

    Raises: ArithmeticError, with what is wrong.
    """
    from onelora_compile.kernels.rank1_linear import rank1_linear, rank1_linear_backward

    y, _ = rank1_linear(t.x, t.w, t.c, t.b)
    _near("output", y, add_rank1(F.linear(t.x, t.w, t.c), feature_sum(t.x), t.b))
    if shape.trains_input:
        grad_x, grad_vector = rank1_linear_backward(t.g, t.s, t.w, t.b)
        _near("gradient of x", grad_x, (t.g @ t.w).float() + (t.g.float() @ t.b.float())[:, None])
        _near("gradient of the vector", grad_vector, (t.s.T @ t.g.float())[0])


def _near(what: str, actual: Tensor, expected: Tensor) -> None:
    """Within a hundredth in Frobenius norm: bfloat16 rounds by 0.002, TF32 by less; a wrong tile is far beyond."""
    difference = float((actual.float() - expected.float()).norm() / expected.float().norm())
    if not difference <= 0.01:
        raise ArithmeticError(f"its {what} differs from PyTorch's by {difference:.1%}")


CHECKED: dict[str, Callable[[Shape, Tensors], None]] = {"fused_kernel": check_fused_kernel}
CLOCKED: dict[str, Callable[[Shape, Tensors], Callable[[], object]]] = {
    "producer_consumer": _producer_consumer,
    "fused_kernel": _fused_kernel,
}
