"""The operator `onelora::rank1_linear`: an adapted linear in one kernel forward and one backward.

    rank1_linear(x, W, c, b) -> (W x + c + b sum(x), sum(x))

Importing this module registers it; that needs Triton.  The operator is opaque to Dynamo, AOTAutograd and Inductor,
which keep it whole.  Autograd saves the feature sum, the weight and the vector.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from onelora_compile.errors import StateError
from onelora_compile.kernels import NO_GPU, configs, interpreted
from onelora_compile.kernels.rank1_matmul import rank1_matmul_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rank1_matmul(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    row: Tensor | None = None,
    column: Tensor | None = None,
    left: Tensor | None = None,
    tile: configs.Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A w + bias + rows ⊗ column, where rows = a row; and down = aᵀ left.

    Shapes: a [M, K] and w [K, N] of any strides; bias and column [N]; row [K]; left [M] -> [M, N], [M], [K] or None.
    Dtype: a and w the same, of float32, bfloat16, float16; the others any of these; out as a, rows and down float32.
    `tile`: None takes the fastest, which the first call for a size measures.
    Raises: StateError on a device that Triton does not run on; TypeError for another dtype.
    """
    if a.dtype not in DTYPES or w.dtype != a.dtype:
        raise TypeError(f"rank1_matmul takes float32, bfloat16 or float16, the same twice; got {a.dtype} and {w.dtype}")
    if not (a.is_cuda or interpreted()):
        raise StateError(f"rank1_matmul on a tensor on {a.device}: {NO_GPU}, or TRITON_INTERPRET=1 for tests")
    (m, k), n = a.shape, w.shape[1]
    # The interpreter cuts float32 to bfloat16 instead of rounding.
    out = a.new_empty(m, n, dtype=torch.float32 if interpreted() else a.dtype)
    rows = torch.empty(m, device=a.device, dtype=torch.float32)
    down = None if left is None else torch.zeros(k, device=a.device, dtype=torch.float32)
    if m == 0 or n == 0:  # nothing to launch; the sums are those of nothing, or of the rows alone
        if n == 0:
            rows = a.float().sum(1) if row is None else a.float() @ row.float()
            down = None if left is None else a.float().T @ left.float()
        return out.to(a.dtype), rows, down
    # The tuner picks the height of a block: room for the lowest.
    lowest = min(one.BLOCK_M for one in ([tile] if tile else _tiles(a.dtype.itemsize, left is not None)))
    partial = rows if left is None else rows.new_empty(triton.cdiv(m, lowest), k)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    optional = [one if one is None else one.contiguous() for one in (bias, row, column, left)]
    pointers = [rows if one is None else one for one in optional]
    names = ("HAS_BIAS", "HAS_ROW", "HAS_COLUMN", "HAS_LEFT")
    flags: dict[str, Any] = {name: one is not None for name, one in zip(names, optional, strict=True)}
    flags |= {"PRECISION": _precision(a.dtype), "WIDEN": interpreted()}
    arguments = (a, w, *pointers, out, rows, partial, m, n, k, *a.stride(), *w.stride(), _bucket(m))
    with torch.cuda.device(a.device) if a.is_cuda else _nothing():
        if tile is None:
            tuned = _tuned(a.dtype.itemsize, left is not None)
            tuned[grid](*arguments, **flags, **configs.OPTIONS)
            height = tuned.best_config.kwargs["BLOCK_M"]
        else:
            launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **configs.OPTIONS}
            launch = {} if interpreted() else launch
            rank1_matmul_kernel[grid](*arguments, **flags, **tile.blocks, **launch)
            height = tile.BLOCK_M
    if left is not None:
        down = partial[: triton.cdiv(m, height)].sum(0)
    return out.to(a.dtype), rows, down


def _tiles(itemsize: int, backward: bool) -> tuple[configs.Tile, ...]:
    return (configs.INTERPRETED,) if interpreted() else configs.tiles(itemsize, backward)


@functools.cache
def _tuned(itemsize: int, backward: bool) -> Any:
    choices = [
        triton.Config(tile.blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)
        for tile in _tiles(itemsize, backward)
    ]
    key = ["M_BUCKET", "N", "K", "HAS_ROW", "HAS_COLUMN", "PRECISION"]
    return triton.autotune(choices, key=key)(rank1_matmul_kernel)


def _bucket(m: int) -> int:
    """Sizes between two powers of two share their tiles: batches vary."""
    return 1 << (m - 1).bit_length()


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where the user allowed it for matmuls."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


def _rows(x: Tensor) -> Tensor:
    """All axes but the last as one; a last axis of size 0 leaves nothing to infer it from."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@torch.library.custom_op("onelora::rank1_linear", mutates_args=())
def rank1_linear(x: Tensor, weight: Tensor, bias: Tensor | None, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The output of an adapted linear, and the feature sum of its input.

    Shapes: x [*, in_features], weight [out_features, in_features], bias and vector [out_features]
    -> [*, out_features], [*, 1].  Dtype: x and weight the same; the sum is float32.
    """
    y, rows, _ = rank1_matmul(_rows(x), weight.T, bias, column=vector)
    return y.view(*x.shape[:-1], weight.shape[0]), rows.view(*x.shape[:-1], 1)


@torch.library.custom_op("onelora::rank1_linear_backward", mutates_args=())
def rank1_linear_backward(g: Tensor, s: Tensor, weight: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and, in float32, of the vector.

    Shapes: g [*, out_features], s [*, 1], weight [out_features, in_features], vector [out_features]
    -> [*, in_features], [out_features].
    """
    grad_x, _, down = rank1_matmul(_rows(g), weight, row=vector, left=s.reshape(-1))
    assert down is not None
    return grad_x.view(*g.shape[:-1], weight.shape[1]), down


@rank1_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, vector: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@rank1_linear_backward.register_fake
def _(g: Tensor, s: Tensor, weight: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(*g.shape[:-1], weight.shape[1]), g.new_empty(g.shape[-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, vector = inputs
    trains_weight = ctx.needs_input_grad[1]
    ctx.save_for_backward(output[1], weight, vector, *([x] if trains_weight else []))
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, g: Tensor | None, of_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    s, weight, vector, *x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = grad_vector = None
    if g is not None:
        rows = _rows(g)
        if needs[0]:
            grad_x, down = torch.ops.onelora.rank1_linear_backward(g, s, weight, vector)
            grad_vector = down.to(vector.dtype)
        elif needs[3]:
            grad_vector = (rows * s.reshape(-1, 1)).sum(0).to(vector.dtype)
        if x:
            grad_weight = rows.T @ _rows(x[0])
        if needs[2]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if of_sum is not None and needs[0]:
        spread = of_sum.expand(*of_sum.shape[:-1], weight.shape[1]).to(weight.dtype)
        grad_x = spread if grad_x is None else grad_x + spread
    return grad_x, grad_weight, grad_bias, grad_vector if needs[3] else None


rank1_linear.register_autograd(_backward, setup_context=_setup_context)
