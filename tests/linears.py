"""Subclasses of nn.Linear with a forward of their own, and what becomes of each.

name -> (build, what: "weight" if a call is W x + c by the parameter `weight`, "output" if it is something else, "read"
if it returns something else than one output for an input, and the input axes of the weight)
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

IN, OUT = 8, 6


def linear(forward, set_up=lambda self: None, sizes=(IN, OUT)):
    """A linear with this forward(self, x); `set_up` may give it more."""

    def build():
        made = type("Own", (nn.Linear,), {"forward": forward})(*sizes)
        set_up(made)
        return made

    return build


def base(self, x):
    return F.linear(x, self.weight, self.bias)


def with_buffer(name, value):
    return lambda self: self.register_buffer(name, value)


def with_parameter(name, *shape):
    return lambda self: setattr(self, name, nn.Parameter(torch.ones(shape)))


def with_property(made, name="weight"):
    """Its weight is a property: twice what is stored."""
    kind = type(made)
    made.__class__ = type("Own", (kind,), {name: property(lambda self: self._parameters[name] * 2)})


def with_cache(self):
    self.register_buffer("ready", torch.round(self.weight.detach() * 8) / 8)


def bit_linear():
    """What transformers makes of a linear for BitNet: weight and input are quantised in each call."""
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(IN, OUT)


def bit_linear_online():
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(IN, OUT, online_quant=True)


def fake_quantised():
    import torch.ao.nn.qat as qat
    from torch.ao.quantization import get_default_qat_qconfig

    return qat.Linear(IN, OUT, qconfig=get_default_qat_qconfig("x86"))


def scaled_conv1d():
    from transformers.pytorch_utils import Conv1D

    class Own(Conv1D):
        def forward(self, x):
            return super().forward(x) * 0.5

    return Own(OUT, IN)


def pruned_bias():
    """Its bias is a plain tensor, computed before each call."""
    with torch.no_grad():  # what autograd made could not be copied
        return prune.random_unstructured(nn.Linear(IN, OUT), "bias", 0.5)


def parametrized_bias():
    made = nn.Linear(IN, OUT)
    parametrize.register_parametrization(made, "bias", nn.Tanh())
    return made


def tensor_bias():
    made: Any = nn.Linear(IN, OUT)
    bias = made.bias.detach()
    del made.bias
    made.bias = bias
    return made


def with_norm():
    norm = nn.BatchNorm1d(OUT)
    return linear(lambda self, x: self.norm(base(self, x)), lambda self: setattr(self, "norm", norm))()


def zeros():
    made = linear(lambda self, x: base(self, x) * 3)()
    nn.init.zeros_(made.weight)
    return made


LINEARS = {
    "inherited": (linear(nn.Linear.forward), "weight", (1,)),
    "functional": (linear(base), "weight", (1,)),
    "matmul": (linear(lambda self, x: x @ self.weight.T + self.bias), "weight", (1,)),
    "any_arguments": (linear(lambda self, *args, **kwargs: nn.Linear.forward(self, *args, **kwargs)), "weight", (1,)),
    "cast": (linear(lambda self, x: base(self, x.to(self.weight.dtype)).to(x.dtype)), "weight", (1,)),
    "rows": (linear(lambda self, x: base(self, x.reshape(-1, IN)).view(*x.shape[:-1], OUT)), "weight", (1,)),
    "argument_without_effect": (linear(lambda self, x, scale=1.0, flag=False: base(self, x)), "weight", (1,)),
    "other_bias": (linear(lambda self, x: F.linear(x, self.weight) + self.bias.relu()), "weight", (1,)),
    "pruned_bias": (pruned_bias, "weight", (1,)),
    "parametrized_bias": (parametrized_bias, "weight", (1,)),
    "tensor_bias": (tensor_bias, "weight", (1,)),
    "transposed": (linear(lambda self, x: x @ self.weight, sizes=(OUT, IN)), "weight", (0,)),
    "own_lora": (
        linear(lambda self, x: base(self, x) + x @ self.a * 0.5, with_parameter("a", IN, OUT)),
        "weight",
        (1,),
    ),
    "residual": (linear(lambda self, x: x + base(self, x), sizes=(IN, IN)), "weight", (1,)),
    "residual_of_rows": (
        linear(lambda self, x: base(self, x.reshape(-1, IN)).view(x.shape) - x * 0.5, sizes=(IN, IN)),
        "weight",
        (1,),
    ),
    "dropped": (linear(lambda self, x: F.dropout(base(self, x), 0.5, self.training)), "weight", (1,)),
    "input_dropped": (linear(lambda self, x: base(self, F.dropout(x, 0.5, self.training))), "weight", (1,)),
    "input_detached": (linear(lambda self, x: base(self, x.detach())), "weight", (1,)),
    "negative": (linear(lambda self, x: -F.linear(-x, self.weight)), "weight", (1,)),
    "read_twice": (linear(lambda self, x: base(self, x) + F.linear(x, self.weight).relu()), "output", None),
    "used_twice": (linear(lambda self, x: (y := base(self, x)) + y.relu()), "output", None),
    "doubled": (linear(lambda self, x: (y := base(self, x)) + y), "output", None),
    "scaled": (linear(lambda self, x: base(self, x) * 0.5), "output", None),
    "scaled_by_a_buffer_of_ones": (
        linear(lambda self, x: base(self, x) * self.scale, with_buffer("scale", torch.ones(1))),
        "output",
        None,
    ),
    "scaled_by_a_parameter": (
        linear(lambda self, x: base(self, x) * self.gain, with_parameter("gain", OUT)),
        "output",
        None,
    ),
    "scaled_addmm": (
        linear(lambda self, x: torch.addmm(self.bias, x.reshape(-1, IN), self.weight.t(), alpha=0.5)),
        "read",
        (1,),
    ),
    "scaled_input": (linear(lambda self, x: base(self, x * 2)), "output", None),
    "scaled_zeros": (zeros, "output", None),
    "scaled_conv1d": (scaled_conv1d, "output", None),
    "activated": (linear(lambda self, x: base(self, x).relu()), "output", None),
    "input_activated": (linear(lambda self, x: base(self, x.tanh())), "output", None),
    "normalised": (linear(lambda self, x: F.linear(x, F.normalize(self.weight), self.bias)), "output", None),
    "masked": (
        linear(lambda self, x: F.linear(x, self.weight.tril(), self.bias)),
        "output",
        None,
    ),
    "quantising": (linear(lambda self, x: F.linear(x, (self.weight * 8).round() / 8, self.bias)), "output", None),
    "cached": (linear(lambda self, x: F.linear(x, self.ready, self.bias), with_cache), "output", None),
    "fake_quantised": (fake_quantised, "output", None),
    "bit_linear": (bit_linear, "output", None),
    "bit_linear_online": (bit_linear_online, "output", None),
    "argument_with_a_default": (linear(lambda self, x, scale=1.0: base(self, x) * scale), "output", None),
    "argument_none": (
        linear(lambda self, x, scale=None: base(self, x) if scale is None else base(self, x) * scale),
        "output",
        None,
    ),
    "property": (linear(base, with_property), "output", None),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)), "output", None),
    "parametrized_and_activated": (
        lambda: nn.utils.parametrizations.weight_norm(linear(lambda self, x: base(self, x).relu())()),
        "output",
        None,
    ),
    "clamped_far_out": (linear(lambda self, x: base(self, x).clamp(-1e3, 1e3)), "output", None),
    "input_clamped": (linear(lambda self, x: base(self, x.clamp(-50, 50))), "output", None),
    "by_dtype": (linear(lambda self, x: base(self, x) * (2 if x.dtype == torch.bfloat16 else 1)), "output", None),
    "by_rank": (linear(lambda self, x: base(self, x) * (2 if x.ndim > 3 else 1)), "output", None),
    "activated_in_training": (
        linear(lambda self, x: base(self, x).relu() if self.training else base(self, x)),
        "read",
        (1,),
    ),
    "scaled_in_training": (linear(lambda self, x: base(self, x) * (1 + self.training)), "read", (1,)),
    "quantising_in_training": (
        linear(lambda self, x: base(self, x + (x.round() - x).detach()) if self.training else base(self, x)),
        "read",
        (1,),
    ),
    "two_outputs_in_training": (
        linear(lambda self, x: (base(self, x), self.weight) if self.training else base(self, x)),
        "read",
        (1,),
    ),
    "normed": (with_norm, "output", None),
    "scaled_with_gradients": (
        linear(lambda self, x: base(self, x) * (1 + (torch.is_grad_enabled() and self.training))),
        "read",
        (1,),
    ),
    "channels_first": (
        linear(lambda self, x: base(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if x.ndim == 4 else base(self, x)),
        "read",
        (1,),
    ),
    "flattening": (linear(lambda self, x: base(self, x.flatten(1))), "read", (1,)),
    "pooling": (linear(lambda self, x: base(self, x.mean(1) if x.ndim == 3 else x)), "read", (1,)),
    "last_token": (linear(lambda self, x: base(self, x[:, -1] if x.ndim == 3 else x)), "read", (1,)),
    "two_outputs": (linear(lambda self, x: (base(self, x), None)), "read", (1,)),
    "other_axis": (linear(lambda self, x: base(self, x.mT).mT), "read", (1,)),
}
OUTPUT = [name for name, (_, what, _) in LINEARS.items() if what == "output"]
CORE = {
    "functional",
    "pruned_bias",
    "residual",
    "used_twice",
    "scaled",
    "activated",
    "bit_linear",
    "argument_none",
    "property",
}


def long(names):
    """Most of them only in the long run: each costs a compilation or an export."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in CORE)) for name in names]


class Model(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.first, self.own = nn.Linear(5, IN), made

    def forward(self, x):
        y = self.own(self.first(x))
        return y[0] if isinstance(y, tuple) else y


def built(name):
    torch.manual_seed(0)
    model = Model(LINEARS[name][0]()).eval()
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model, torch.randn(8, 5)
