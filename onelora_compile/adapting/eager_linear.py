"""The adapted linear of eager mode: one autograd function without passes of its own over x, y or their gradients.

    forward    s = sum(x);  y = W x + c, then y += s b in the memory that the matmul has just written
    backward   grad x = g W + (g b) 1ᵀ, the second term being what the matmul accumulates onto;  grad b = gᵀ s

The composite operator makes a new y, a product g * s and one g * b of the size of g, and adds a spread [*, 1] to the
gradient of x.  Measured by benchmarks/bench_linear.py (results/linear.csv).  An in-place update without a function of
its own is slower than the composite: the output of a linear of three axes is a view, and autograd clones the gradients
of views that are written to.

Only for what it computes exactly as the composite does; everything else takes the composite (`takes`).

Private API, as in torch/autograd/function.py::Function.apply and torch/overrides.py of torch 2.13: the tests whether a
transform of torch.func, a mode or forward-mode differentiation is active.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

_DTYPES = (torch.float32, torch.float64)  # half precision sums in float32, so its matmuls would need copies of g
_PLAIN = (Tensor, nn.Parameter)
_PARAMETERS = ("weight", "bias")  # of an ordinary nn.Linear, which without a bias has None there


def takes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], vector: Tensor) -> bool:
    """Whether `adapted_linear` computes this call: an ordinary, frozen nn.Linear in one dtype, outside any tracing.

    Subclasses of tensors (DTensor, fake and quantised ones), transforms of torch.func, autocast, a weight that is
    trained too, an overridden forward, a weight or a bias that is no parameter (pruned, computed): all False.
    """
    if torch.compiler.is_compiling():  # first: nothing below has to be known to any release of Dynamo
        return False
    if len(args) != 1 or kwargs or getattr(module, "_onelora_base", None) is not nn.Linear:
        return False
    if any(name not in module._parameters for name in _PARAMETERS):
        return False
    x, weight, bias = args[0], module._parameters["weight"], module._parameters["bias"]
    if type(x) is not Tensor or type(weight) not in _PLAIN or weight is None or x.ndim < 1:
        return False
    tensors = (weight, vector) if bias is None else (weight, vector, bias)
    same = all(type(one) in _PLAIN and one.dtype == x.dtype and one.device == x.device for one in tensors)
    if not same or x.dtype not in _DTYPES or x.layout != torch.strided or x.is_nested:
        return False
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    return not (
        torch._C._is_tracing()
        or (not x.is_meta and torch.is_autocast_enabled(x.device.type))  # the meta device has none
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
    )


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, vector: Tensor) -> Tensor:
    """W x + c + b sum(x) of a frozen linear.

    Shapes: x [*, in_features], weight [out_features, in_features], bias and vector [out_features]
    -> [*, out_features].  Dtype: float32 or float64, the same everywhere.
    Kept for backward: the feature sum, weight and vector.
    Source: arXiv 2503.08333, section 3.2.
    """
    y: Tensor = _AdaptedLinear.apply(x, weight, bias, vector)[0]
    return y


def add_in_place(y: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """`rank1_update` without a gradient, in the memory of y, which nobody else has.

    Shapes: y [*, out_features], x [*, in_features], vector broadcasts against y -> [*, out_features].
    Dtype: that of y and x; the vector may be in a wider one, and is rounded to it first.
    """
    return y.addcmul_(x.sum(-1, keepdim=True), vector.to(y.dtype))


class _AdaptedLinear(torch.autograd.Function):
    """Returns (y, feature sum).

    The sum is an output because a saved value that is neither input nor output has no gradient of its own: second
    derivatives would be wrong without a word.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, vector: Tensor) -> tuple[Tensor, Tensor]:
        s = x.sum(-1, keepdim=True)
        ctx.save_for_backward(s, weight, vector)
        ctx.set_materialize_grads(False)
        y = F.linear(x, weight, bias).addcmul_(s, vector)
        # Of one axis, or three and more, it is a view, and a view that a function returns can't be written to in
        # place: nn.ReLU(inplace=True) would fail.  This one shares the memory and is no view to autograd.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y, s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, Tensor | None]:
        s, weight, vector = ctx.saved_tensors
        g, of_sum = grads
        if g is None:
            return None if of_sum is None else of_sum.expand(*s.shape[:-1], weight.shape[1]), None, None, None
        rows = g.reshape(s.numel(), g.shape[-1])
        grad_x = grad_vector = None
        if ctx.needs_input_grad[0]:
            grad_s = (rows @ vector).unsqueeze(1)
            if of_sum is not None:
                grad_s = grad_s + of_sum.reshape(-1, 1)
            grad_x = torch.addmm(grad_s, rows, weight).view(*g.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[3]:
            grad_vector = (s.reshape(1, -1) @ rows).view(-1)
        return grad_x, None, None, grad_vector
