"""Lowering `producer_consumer`: Inductor takes the sum where x is made, and adds the update where y is used.

    forward    s = sum(x) in the kernel that produces x (LayerNorm, GELU);  y + s b in the one that consumes y
    backward   g · b in the kernel that produces g, spread over gx in the one that consumes gx;  gb = s g as a matmul

The vector's gradient is a sum over rows.  Derived from `addcmul` it is a product of the size of g and a reduction
along columns, which Inductor writes as a walk down each column; as a matmul [1, rows] x [rows, out_features] it is one
call of a library that reads g once.  It also leaves fewer kernels: 53 instead of 66 for a ViT block, forward and
backward, where the frozen base has 35.  Over whole models: benchmarks/bench_spelling.py, results/spelling.csv.
Only on a CPU and in one dtype: in half precision g would have to be copied to float32, and on a GPU nothing has been
measured; there the update is `addcmul`.

Cost beyond the frozen linear: reads of g for gb, and, beside attention and matmuls, passes over x, y and g.
Wins where the neighbours are pointwise, norms or reductions.  Takes every update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from onelora_compile.ops import accumulation_dtype
from onelora_compile.passes.lowerings.lowering import Lowering, Update
from onelora_compile.passes.sites.linear_site import example

_library = torch.library.Library("onelora", "FRAGMENT")
_library.define("add_rank1_by_matmul(Tensor y, Tensor s, Tensor vector) -> Tensor")


class _AddRank1(torch.autograd.Function):
    """y + s b, whose backward takes the gradient of b as a matmul; differentiable in both modes, any number of times.

    Shapes: y [*, out_features], s [*, 1], vector [out_features] -> [*, out_features].  Dtype: the same everywhere.
    """

    @staticmethod
    def forward(y: Tensor, s: Tensor, vector: Tensor) -> Tensor:
        return torch.addcmul(y, s, vector)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, s, vector = inputs
        ctx.save_for_backward(s, vector)
        ctx.save_for_forward(s, vector)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        s, vector = ctx.saved_tensors
        grad_s = grad_vector = None
        if ctx.needs_input_grad[1]:
            grad_s = (g * vector).sum(-1, keepdim=True)  # in the kernel that produces g
        if ctx.needs_input_grad[2]:
            grad_vector = (s.reshape(1, -1) @ g.reshape(s.numel(), g.shape[-1])).view(-1)
        return g if ctx.needs_input_grad[0] else None, grad_s, grad_vector

    @staticmethod
    def jvp(ctx: Any, y: Tensor, s: Tensor, vector: Tensor) -> Tensor:
        primal_s, primal_vector = ctx.saved_tensors
        return y + s * primal_vector + primal_s * vector


def _add_rank1_by_matmul(y: Tensor, s: Tensor, vector: Tensor) -> Tensor:
    if torch._C._are_functorch_transforms_active():  # as in torch/autograd/function.py::Function.apply
        return torch.addcmul(y, s, vector)  # an operator of functorch can't call a function of autograd
    result: Tensor = _AddRank1.apply(y, s, vector)
    return result


# An operator and not a call of the function: graphs that hold Python functions are not cached by AOTAutograd.
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    _library.impl("add_rank1_by_matmul", _add_rank1_by_matmul, _key)
ADD_RANK1_BY_MATMUL = torch.ops.onelora.add_rank1_by_matmul.default


def _why_not(update: Update) -> str | None:
    del update
    return None


def _rewrite(graph: fx.Graph, update: Update) -> fx.Node:
    operator = ADD_RANK1_BY_MATMUL if _matmul_gains(update) else torch.addcmul
    y, value = example(update.y), example(update.node)
    dtypes = {tensor.dtype for tensor in map(example, (update.y, update.s, update.vector)) if tensor is not None}
    with graph.inserting_before(update.node):
        fused = graph.call_function(operator, (update.y, update.s, update.vector))
        fused.meta = update.node.meta.copy()
        if len(dtypes) > 1 and y is not None and value is not None:  # addcmul promoted: round once, to y's dtype
            rounded = graph.call_method("to", (fused, y.dtype))
            rounded.meta = fused.meta.copy()
            key = "val" if "val" in fused.meta else "example_value"
            fused.meta[key] = value.to(accumulation_dtype(value.dtype))
            return rounded
    return fused


def _matmul_gains(update: Update) -> bool:
    """On a CPU, in one dtype, for an update of the plain form: a vector [n] along the last axis."""
    y, s, vector = map(example, (update.y, update.s, update.vector))
    if y is None or s is None or vector is None or y.device.type != "cpu":
        return False
    plain = vector.ndim == 1 and s.ndim == y.ndim and s.shape[-1] == 1 and s.shape[:-1] == y.shape[:-1]
    return plain and y.dtype == s.dtype == vector.dtype


PRODUCER_CONSUMER = Lowering("producer_consumer", _why_not, _rewrite)
