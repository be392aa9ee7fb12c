"""A matmul that adds a rank-1 term while it streams its input, in Triton; the arithmetic of the fused kernel.

    out[m, n] = sum_k a[m, k] w[k, n] + bias[n] + rows[m] column[n]
    rows[m]   = sum_k a[m, k] row[k]
    down[k]   = sum_m left[m] a[m, k]

`row`, `column`, `bias` and `left` may be left out: row and column are then ones, bias is zero, `down` is not computed.
A linear of 1LoRA is one launch forward (w = Wᵀ, column = b) and one backward:

    y  = x Wᵀ + c + (sum x) bᵀ          a = x, w = Wᵀ, bias = c, column = b;  rows is the feature sum
    gx = g W + (g b) 1ᵀ,  gb = gᵀ s     a = g, w = W, row = b, left = s;      down is the vector's gradient

x and g are read once, by the matmul itself: the row sum is taken of the tiles that the matmul multiplies, and each
program adds its share of `down` for the tiles of a that fall to it.  Sums and the epilogue are float32, `out` is
rounded once.  `down` comes as one partial sum for each block of rows, added up by the caller: no atomics, so it is
the same at each run.

Bytes beyond the matmul's own: M (rows) + N (column), and in backward K x ceil(M / BLOCK_M) partial sums of 4 bytes.
Flops beyond the matmul's own: M K for each column of programs, 2 M N in the epilogue, 2 M K for `down`.

Not here: variants that use Hopper's TMA or persistent programs.  They would have to be measured first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank1_matmul_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    row_ptr,
    column_ptr,
    left_ptr,
    out_ptr,
    rows_ptr,
    partial_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_wk,
    stride_wn,
    M_BUCKET,  # only a key for the autotuner
    HAS_BIAS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 bit patterns
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of out; see the module for the formula."""
    # Programs that share rows of a or columns of w run side by side, so that these stay in the L2 cache.
    pid = tl.program_id(0)
    programs_m, programs_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * programs_n
    first_m = (pid // in_group) * GROUP_M
    group_size = tl.minimum(programs_m - first_m, GROUP_M)
    pid_m = first_m + (pid % in_group) % group_size
    pid_n = (pid % in_group) // group_size

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m, in_n = offs_m < M, offs_n < N
    # 64 bits: M x K passes 2^31 with long batches.
    a_tile = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am + offs_k.to(tl.int64)[None, :] * stride_ak
    w_tile = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn
    if HAS_LEFT:
        left = tl.load(left_ptr + offs_m, mask=in_m, other=0.0).to(tl.float32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    rows = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K + offs_k
        in_k = k < K
        a = tl.load(a_tile, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w = tl.load(w_tile, mask=in_k[:, None] & in_n[None, :], other=0.0)
        wide = a.to(tl.float32)
        if WIDEN:
            acc = tl.dot(wide, w.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        if HAS_ROW:
            rows += tl.sum(wide * tl.load(row_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :], axis=1)
        else:
            rows += tl.sum(wide, axis=1)
        if HAS_LEFT:
            if step % programs_n == pid_n:  # each tile of a is one program's, and every program has its share
                down = tl.sum(wide * left[:, None], axis=0)
                tl.store(partial_ptr + pid_m.to(tl.int64) * K + k, down, mask=in_k)
        a_tile += BLOCK_K * stride_ak
        w_tile += BLOCK_K * stride_wk

    # One use of what the loop carries: Triton 3.7's pass for reductions in loops asserts on two (float32, forward).
    rows = tl.where(in_m, rows, 0.0)
    if HAS_COLUMN:
        column = tl.load(column_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
        acc += rows[:, None] * column[None, :]
    else:
        acc += rows[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out_tile = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
    if pid_n == 0:
        tl.store(rows_ptr + offs_m, rows, mask=in_m)
