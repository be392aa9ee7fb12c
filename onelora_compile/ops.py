"""The operators `onelora::…`: the definition of an adapted linear, in one place.

    rank1_update(y, x, vector) = add_rank1(y, feature_sum(x), vector) = y + vector * sum(x)
    adapted_weight(W, vector)  = W + vector 1ᵀ

`rank1_update` is the canonical form that adapted modules call; the passes rewrite it into `feature_sum` and
`add_rank1` when several sites share one input.  `adapted_weight` is what reading a weight returns that is used
without its module; the passes rewrite it into the other forms.  All are composites: in graphs of Dynamo and
`torch.export` each stays one node, and any backend, autograd, vmap and fake tensors see plain PyTorch operators inside.

Of the first three autograd saves the feature sum and the vector; the input x is never kept for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onelora_compile.sharded import is_partial, is_sharded, reduced_once
from onelora_compile.torch_versions import warn_if_untested

warn_if_untested(str(torch.__version__))  # here, as nothing of this package works without its operators
_library = torch.library.Library("onelora", "DEF")
_library.define("feature_sum(Tensor x) -> Tensor")
_library.define("add_rank1(Tensor y, Tensor s, Tensor vector) -> Tensor")
_library.define("rank1_update(Tensor y, Tensor x, Tensor vector) -> Tensor")
_library.define("adapted_weight(Tensor weight, Tensor vector, int[] dims) -> Tensor")
_library.define("vector(Tensor value, str name) -> Tensor")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and updates are computed: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def feature_sum(x: Tensor) -> Tensor:
    """The fixed compression of 1LoRA: the sum over the last dimension.

    Shapes: x [*, in_features] -> [*, 1].
    Dtype: float32 (float64 for float64 x): a half-precision sum of thousands of features drifts or overflows.
    Source: arXiv 2503.08333, section 3.2.
    """
    dtype = accumulation_dtype(x.dtype)
    if x.layout == torch.jagged:  # whose sum has no backward
        ones = torch.ones(1, x.shape[-1], dtype=dtype, device=x.device)
        return torch.nn.functional.linear(x.to(dtype), ones)
    return torch.sum(x, dim=-1, keepdim=True, dtype=dtype)


def has_feature_sum(x: Tensor) -> bool:
    """Whether x can be summed over its last axis: no sparse or MKL-DNN tensor; of nested ones a jagged one alone."""
    return x.layout == torch.jagged or (x.layout == torch.strided and not x.is_nested)


def add_rank1(y: Tensor, s: Tensor, vector: Tensor) -> Tensor:
    """The decompression: y + s * vector, computed in the widest of the dtypes and rounded once to y's.

    Shapes: y [*, out_features], s [*, 1], vector [out_features] -> [*, out_features].  A vector with more axes (of
    experts, or with out_features elsewhere) broadcasts against y as it is.
    Raises: RuntimeError where a vector [n] has another length than out_features (it would broadcast).
    Source: arXiv 2503.08333, section 3.2.
    """
    if vector.ndim < 2:
        torch._check(
            vector.shape[-1] == y.shape[-1],
            lambda: f"the vector has {vector.shape[-1]} entries; the linear has out_features={y.shape[-1]}",
        )
    if y.layout == torch.jagged:
        return (y + s * vector).to(y.dtype)  # nested tensors have no addcmul
    if is_sharded(y):
        vector = reduced_once(vector)
        if is_partial(y):
            return (y + s * vector).to(y.dtype)  # partial still: one reduction for both
    # addcmul is one pass over y in every dtype, and promotes by itself.
    return torch.addcmul(y, s, vector).to(y.dtype)


def rank1_update(y: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """The output of a frozen linear, adapted: y + sum(x) * vector, which is (W + vector 1ᵀ) x + c.

    Of an input that PyTorch can't sum it is a linear by vector 1ᵀ, in the input's dtype, which keeps the input.
    Shapes: y [*, out_features], x [*, in_features], vector [out_features] -> [*, out_features].
    Dtype: that of y.
    Source: arXiv 2503.08333, section 3.2.
    """
    if not has_feature_sum(x):
        return y + torch.nn.functional.linear(x, vector.to(x.dtype).unsqueeze(1).expand(-1, x.size(-1)))
    return add_rank1(y, feature_sum(x), vector)


def adapted_weight(weight: Tensor, vector: Tensor, dims: Sequence[int]) -> Tensor:
    """The weight of an adapted linear: W + vector 1ᵀ, computed in the widest of the dtypes and rounded once to W's.

    Shapes: weight of any layout, `dims` its input axes, from 0; vector of the other axes in their order:
    [out_features] for weights [out_features, in_features] (dims 1) and [in_features, out_features] (dims 0),
    [experts, out_features] for weights of experts.
    Dtype: that of the weight.
    Source: arXiv 2503.08333, section 3.2.
    """
    for dim in sorted(dims):
        vector = vector.unsqueeze(dim)
    return (weight + vector).to(weight.dtype)


def vector(value: Tensor, name: str) -> Tensor:
    """The identity; only in exported programs, where it marks a vector with its name.

    Shapes: any -> the same.  Dtype: any -> the same.
    """
    del name
    return value.clone()  # an operator may not return its input


for _function in (feature_sum, add_rank1, rank1_update, adapted_weight, vector):
    # The second key is how torch.func.vmap takes an operator apart instead of looping over the batch.
    for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        _library.impl(_function.__name__, _function, _key)

# What graphs hold and passes match.
FEATURE_SUM = torch.ops.onelora.feature_sum.default
ADD_RANK1 = torch.ops.onelora.add_rank1.default
RANK1_UPDATE = torch.ops.onelora.rank1_update.default
ADAPTED_WEIGHT = torch.ops.onelora.adapted_weight.default
VECTOR = torch.ops.onelora.vector.default
