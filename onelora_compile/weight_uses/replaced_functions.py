"""What runs in the place of functions that take no stand-ins of values, while code is followed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_MADE_OF_SIZES = ("ones", "zeros", "empty", "rand", "randn")
_ABOUT = {"finfo": torch.float32, "iinfo": torch.int64}  # of a dtype that is not known


def output_of_a_module(*args: Any, **kwargs: Any) -> None:
    """Stands in the graph for the call of a submodule."""


def output_of_a_script(*args: Any, **kwargs: Any) -> None:
    """Stands in the graph for the call of a function of `torch.jit.script`."""


def part_of_a_value(value: Any) -> None:
    """Stands in the graph for what `torch.func.vmap` hands to its function."""


def not_entered(function: Any) -> Callable[..., Any]:
    """A function that is one node where it is followed, and itself elsewhere."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found: list[fx.Proxy] = []
        fx.node.map_aggregate((args, kwargs), lambda one: found.append(one) if isinstance(one, fx.Proxy) else None)
        if not found:
            return function(*args, **kwargs)
        return found[0].tracer.create_proxy("call_function", output_of_a_script, args, kwargs)

    return call


def instead_of_torch(tracer: fx.Tracer) -> dict[str, Any]:
    """For functions of torch that take no nodes: as sizes one by one, as a dtype, as a condition."""
    made = {name: functools.partial(_made, tracer, getattr(torch, name)) for name in _MADE_OF_SIZES}
    about = {name: functools.partial(_about, getattr(torch, name), dtype) for name, dtype in _ABOUT.items()}
    return made | about | {"cond": _branch}


def _made(tracer: fx.Tracer, make: Any, *sizes: Any, **kwargs: Any) -> Any:
    if not any(isinstance(size, fx.Proxy) for size in sizes):
        return make(*sizes, **kwargs)
    return tracer.create_proxy("call_function", make, sizes, kwargs)


def both_branches(cond: Any) -> Callable[..., Any]:
    """`torch.cond`, under whatever name, as it is followed in this thread, and itself in others."""
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (_branch if threading.get_ident() == thread else cond)(*args, **kwargs)

    return call


def _branch(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
    """Stands for `torch.cond`: an `if` whose branches are both followed; one inside a branch gets the next answer."""
    outputs = true_fn(*operands), false_fn(*operands)
    return outputs[0] if pred else outputs[1]


def _about(kind: Any, guess: torch.dtype, *dtype: Any, **kwargs: Any) -> Any:
    known = not any(isinstance(one, fx.Proxy) for one in (*dtype, *kwargs.values()))
    return kind(*dtype, **kwargs) if known else kind(guess)


def stored_parameter(module: nn.Module, target: str) -> Any:
    """Stands for `get_parameter`, which takes nothing but an `nn.Parameter`: no proxy, and no adapted weight either."""
    path, _, name = target.rpartition(".")
    return module.get_submodule(path)._parameters[name]
