"""Lowering `fused_kernel`: the linear and its update in one Triton kernel, forward and backward.

    add_rank1(linear(x, W, c), feature_sum(x), b)   ->   onelora::rank1_linear(x, W, c, b)

    forward    the row sum of x is taken in the loop that multiplies x, the update and the bias in its epilogue
    backward   gx = g W + (g b) 1ᵀ is the same kernel with b as weights of the row sum;  gb = gᵀ s in the same loop

Experimental: it has run on no GPU yet, and is taken by `options={"lowering": "fused_kernel"}` alone.  It is proven in
Triton's interpreter against float64, and compiled for sm_80, sm_87 and sm_90 with spills checked.
Cost beyond the frozen linear: no pass over x, y, g or gx; the feature sum and partial sums of gb.  What it risks is the
matmul itself, which is Triton's and not cuBLAS'.

Takes calls of `linear` on a 2-D weight, in float32, bfloat16 or float16, whose output nobody else reads.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from onelora_compile.kernels import why_not as why_no_kernels
from onelora_compile.passes.lowerings.lowering import Lowering, Update
from onelora_compile.passes.sites.linear_site import example

NO_LINEAR = "the update does not follow a call of linear whose output is used by it alone"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not(update: Update) -> str | None:
    y, vector = example(update.y), example(update.vector)
    assert y is not None  # fuse_rank1 leaves alone what has no values
    assert vector is not None
    if reason := why_no_kernels(y.device):
        return reason
    if update.linear is None:
        return NO_LINEAR
    x, weight = map(example, update.linear[:2])
    if x is None or weight is None:
        return "the graph carries no example values"
    if y.dtype not in DTYPES or vector.dtype not in DTYPES:
        return f"no kernel for {y.dtype if y.dtype not in DTYPES else vector.dtype}"
    if not x.dtype == weight.dtype == y.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}, the output {y.dtype} (autocast)"
    plain = all(type(one) in (torch.Tensor, torch.nn.Parameter) or _is_fake(one) for one in (x, weight, vector))
    if not plain or weight.layout != torch.strided:
        return f"the weight is a {type(weight).__name__}, not a plain tensor (quantised, sharded)"
    return "the vector is not one entry for each output" if vector.ndim != 1 or weight.ndim != 2 else None


def _is_fake(value: torch.Tensor) -> bool:
    """A fake tensor of a plain one: Dynamo's fake tensors of other subclasses are those subclasses."""
    return isinstance(value, torch._subclasses.FakeTensor)


def _rewrite(graph: fx.Graph, update: Update) -> fx.Node:
    from onelora_compile.kernels.rank1_linear import rank1_linear  # registers the operator

    del rank1_linear
    assert update.linear is not None
    x, weight, bias = update.linear
    key = "val" if "val" in update.node.meta else "example_value"
    with graph.inserting_before(update.node):
        fused = graph.call_function(torch.ops.onelora.rank1_linear.default, (x, weight, bias, update.vector))
        y = graph.call_function(operator.getitem, (fused, 0))
    fused.meta, y.meta = update.node.meta.copy(), update.node.meta.copy()
    fused.meta[key] = (example(update.node), example(update.s))
    return y


FUSED_KERNEL = Lowering("fused_kernel", _why_not, _rewrite)
