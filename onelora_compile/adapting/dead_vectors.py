"""The first backward tells which vectors learn nothing; this says so, once.

Three ways to be dead: the output of the linear does not reach the loss (no gradient at all); its input sums to zero
or what follows is zero (a gradient of exact zeros); its input always sums to the same number, so that the vector is a
constant bias.  The last is what a LayerNorm with a constant weight causes: its output, before the bias, sums to zero.

In eager the sums are looked at as they pass; in a compiled graph they can't be, so there the LayerNorm itself is looked
for (`constant_inputs`).  What is watched is kept here and not on the modules, so that copies and pickles of a model are
free of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from onelora_compile.dynamo.frames import callers
from onelora_compile.errors import OneLoRAWarning
from onelora_compile.passes.sites.linear_site import LinearSite, example
from onelora_compile.passes.sites.operators import arguments, op_name
from onelora_compile.printable import shortened

# Spread of the sums over the size of what is summed, below which they count as one number: rounding of the dtype.
_CONSTANT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}
_MOST = (
    100  # calls of a module that are looked at: there may be no backward, or its hook has gone with a swapped tensor
)
# What calls the backward of an autograd function; what `Tensor.backward` calls.
_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__
_BACKWARD = torch.autograd.backward.__code__
_THROUGH = {"dropout", "view", "reshape", "contiguous", "to", "float", "half", "bfloat16", "flatten", "unflatten"}


@dataclasses.dataclass
class _Seen:
    """The feature sums of one module so far: extremes, the mean sum of magnitudes, whether any two inputs differed."""

    low: Tensor
    high: Tensor
    size: Tensor
    differ: Tensor
    tolerance: float
    calls: int


_watched: weakref.WeakKeyDictionary[nn.Module, _Seen | None] = weakref.WeakKeyDictionary()
_empty: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # were given inputs without any row


def observe(module: nn.Module, x: Tensor) -> None:
    """Called by adapted linears in eager; costs a look into an empty dictionary once the first backward is over."""
    if not _watched or module not in _watched or not torch.is_grad_enabled() or torch._C._is_tracing():
        return
    if torch._C._are_functorch_transforms_active():
        return  # what vmap and its kind hand in must not outlive them
    if torch._C._len_torch_dispatch_stack():
        return  # selective checkpointing records operators, and has to meet the same ones when it runs again
    if x.layout != torch.strided or x.is_nested or x.is_meta:
        return  # sparse and nested tensors have few operators, those on the meta device no numbers
    if not x.numel():
        _empty.add(module)
        return
    seen = _watched[module]
    if seen is not None and seen.calls == _MOST:
        return
    with torch.no_grad():
        wide = x.detach().reshape(-1, x.shape[-1]).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        sums, size = wide.sum(-1), wide.abs().sum(-1).mean()
        # A DTensor of PyTorch 2.11 has no `!=`.
        low, high, differ = sums.min(), sums.max(), (wide == wide[:1]).logical_not().any()
        if seen is not None:
            low, high, differ = torch.minimum(low, seen.low), torch.maximum(high, seen.high), differ | seen.differ
    _watched[module] = _Seen(
        low, high, size, differ, _CONSTANT.get(x.dtype, 3e-3), 1 + (seen.calls if seen is not None else 0)
    )


def watch(
    vectors: Callable[[], dict[str, nn.Parameter]],
    callers: dict[str, nn.Module],
    known_constant: Callable[[], Iterable[str]],
    frozen_norms: bool,
    mixed: Callable[[], bool],
) -> None:
    """Look at the gradients after the first backward, and warn of vectors that learn nothing.

    Args:
        vectors: gives them by name, as they are now.
        callers: the modules whose input is the linear's, by the name of their vector.
        known_constant: names of vectors whose input a compiled graph showed to sum to one number; asked at the end.
        mixed: whether rows of a batch had adapters of their own, so that a gradient of zeros tells nothing.
        frozen_norms: whether a norm stays as it is, so that what it makes constant is so for ever.
    """
    handles: list[Any] = []
    modules = {name: weakref.ref(module) for name, module in callers.items()}
    hooks: dict[str, weakref.ref[Any]] = {}
    queued: list[bool] = []

    def alive() -> dict[str, nn.Parameter]:
        """The vectors of now that hold their hook: no weak references to them, which `swap_tensors` refuses."""
        held = {name: hook for name, ref in hooks.items() if (hook := ref()) is not None}
        return {name: vector for name, vector in vectors().items() if _holds(vector, held.get(name))}

    def finish() -> None:
        trained = {name: vector for name, vector in alive().items() if vector.requires_grad and not vector.is_meta}
        if _inside_another_backward():
            trained = {name: vector for name, vector in trained.items() if vector.grad is not None}
        called = {name: module for name, ref in modules.items() if (module := ref()) is not None}
        seen = {name: _watched.pop(module, None) for name, module in called.items()}
        for handle in handles:
            handle.remove()
        if mixed():
            return
        constant = set(known_constant()) | {name for name, one in seen.items() if one is not None and _is_constant(one)}
        idle = {name for name, module in called.items() if module in _empty}
        _empty.difference_update(called.values())
        trained = {name: vector for name, vector in trained.items() if name not in idle}
        _warn(trained, constant if frozen_norms else set())

    def first(vector: Tensor) -> None:
        del vector
        if not queued and not _leaves_out(alive().values()):
            # Runs when this backward is over; what DistributedDataParallel and FSDP use. torch/autograd/variable.py
            torch.autograd.Variable._execution_engine.queue_callback(finish)
            queued.append(True)

    for name, vector in vectors().items():
        hook = functools.partial(first)
        # It goes with its vector: what shards a model over processes puts other parameters in their places.
        hooks[name] = weakref.ref(hook, functools.partial(_unwatch, modules.get(name)))
        handles.append(vector.register_post_accumulate_grad_hook(hook))
    for module in callers.values():
        _watched[module] = None


def _holds(vector: nn.Parameter, hook: Any) -> bool:
    return hook is not None and any(hook is one for one in (vector._post_accumulate_grad_hooks or {}).values())


def _unwatch(caller: weakref.ref[nn.Module] | None, hook: weakref.ref[Any]) -> None:
    del hook
    if caller is not None and (module := caller()) is not None:
        _watched.pop(module, None)


def constant_inputs(sites: Iterable[tuple[str, LinearSite]], value_of: Callable[[fx.Node], Tensor | None]) -> list[str]:
    """The sites whose input is the output of a LayerNorm with a constant, frozen weight, by name.

    Args:
        sites: with the names of their vectors.
        value_of: the parameter that a graph input is.
    """
    return [name for name, site in sites if _after_constant_norm(site.x, value_of)]


def _after_constant_norm(node: fx.Node, value_of: Callable[[fx.Node], Tensor | None]) -> bool:
    x = example(node)
    while op_name(node) in _THROUGH and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    given = arguments(node) if op_name(node) == "layer_norm" else None
    if given is None:
        return False
    shape, weight = given["normalized_shape"], given["weight"]
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 1:
        return False
    if x is not None and x.shape[-1] % shape[0]:  # a view whose rows are parts of the norm's
        return False
    if weight is None:
        return True
    value = value_of(weight) if isinstance(weight, fx.Node) else None
    if value is None or value.requires_grad or value.is_meta:
        return False
    return bool(value.min() == value.max())


def _inside_another_backward() -> bool:
    """Reentrant checkpointing and reversible layers run a backward for each segment, in that of a function of autograd.

    What has no gradient yet may still get one; if the backward around it is a `torch.autograd.grad`, elsewhere.
    """
    return any(frame.f_code is _FUNCTION for frame in callers())


def _leaves_out(vectors: Iterable[nn.Parameter]) -> bool:
    """Whether the backward that runs was asked for gradients of some `inputs` alone, and a vector is none of these."""
    for frame in callers():
        if frame.f_code is _BACKWARD:
            if (inputs := frame.f_locals.get("inputs")) is None:
                return False
            asked = {id(one) for one in ([inputs] if isinstance(inputs, Tensor) else inputs)}
            return any(id(vector) not in asked for vector in vectors)
    return False


def _is_constant(seen: _Seen) -> bool:
    spread = (seen.high - seen.low).item()
    return bool(seen.differ) and math.isfinite(spread) and spread <= seen.tolerance * seen.size.item()


def _warn(vectors: dict[str, nn.Parameter], constant: set[str]) -> None:
    without = [name for name, vector in vectors.items() if vector.grad is None]
    zero = [name for name, vector in vectors.items() if vector.grad is not None and not vector.grad.any()]
    bias = [name for name in vectors if name in constant and name not in without]
    zero = [name for name in zero if name not in bias]
    parts = []
    if without:
        parts.append(f"no gradient at all: {shortened(without)} (the loss does not depend on these linears)")
    if zero:
        parts.append(
            f"a gradient of exact zeros: {shortened(zero)} (their input sums to zero, or what follows is zero, as a "
            "zero-initialised layer is at the start)"
        )
    if bias:
        parts.append(
            f"no more than a constant bias, as their input always sums to the same number: {shortened(bias)} (a "
            "LayerNorm with a constant weight before them does that: train the norms too, "
            "OneLoRAConfig(train_norms=True))"
        )
    if parts:
        message = f"vectors that learn nothing, seen after the first backward: {'; '.join(parts)}"
        warnings.warn(message, OneLoRAWarning, stacklevel=2)
