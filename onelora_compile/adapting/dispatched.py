"""Models that accelerate has dispatched (`device_map`): hooks around the forward, weights that are elsewhere meanwhile.

A hook puts a `forward` on the instance, and the one that was there as `_old_forward`.  Of an offloaded module the
parameters are on the meta device between calls; the hook puts new ones in their place for each, from its weights_map.

By names and without an import, as accelerate is no dependency.  Private names of it, as in accelerate/hooks.py of
1.10 to 1.15: `_hf_hook`, `_old_forward`, and the attributes of `AlignDevicesHook`.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.looking.unannounced import subclass

_HOOK, _OLD, _GROUPS = "_hf_hook", "_old_forward", "_diffusers_hook"
# What it puts on instances besides: calls of these would move the model.
_ADDED = ("forward", _OLD, _HOOK, "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def own_forward(module: nn.Module) -> Any:
    """The forward that an instance has in the place of its class's, below a hook of accelerate; None for none."""
    fields = vars(module)
    own = fields.get(_OLD if _HOOK in fields else "forward")
    return None if getattr(own, "__self__", None) is module and _is(own, type(module)) else own


def _is(method: Any, kind: Any) -> bool:
    return isinstance(method, types.MethodType) and method.__func__ is kind.forward


def rebind(module: nn.Module, before: Any, now: Any) -> None:
    """After a change of class: a forward of the class that the instance holds, bound, is that of the other class."""
    for name in (_OLD, "forward"):
        held = vars(module).get(name)
        if held is not None and getattr(held, "__self__", None) is module and _is(held, before):
            vars(module)[name] = types.MethodType(now.forward, module)


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside the block the modules are what they were before accelerate dispatched them, but for where weights are."""
    kept: list[tuple[dict[str, Any], dict[str, Any], bool]] = []
    try:
        for module in model.modules():
            if _HOOK in vars(module):
                fields, own = vars(module), own_forward(module)
                kept.append((fields, {name: fields.pop(name) for name in _ADDED if name in fields}, own is not None))
                if own is not None:
                    fields["forward"] = own
        yield
    finally:
        for fields, taken, instead in kept:
            if instead:
                del fields["forward"]
            fields.update(taken)


def _offloading(module: nn.Module) -> Any:
    """The hook that offloads the module; None where none does."""
    hook = vars(module).get(_HOOK)
    each = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return next((one for one in each if getattr(one, "offload", False)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether the parameters of the module itself are elsewhere between its calls."""
    return _offloading(module) is not None


def offloaded_from_above(model: nn.Module) -> set[nn.Module]:
    """The modules whose weights come with a call of a module around them (`preload_module_classes`)."""
    above = [module for module in model.modules() if getattr(_offloading(module), "place_submodules", False)]
    return {inner for module in above for inner in module.modules() if inner is not module}


def is_in_files(model: nn.Module) -> bool:
    """Whether diffusers keeps weights in files between calls: `enable_group_offload(offload_to_disk_path=)`.

    Private names of it, as in diffusers/hooks/group_offloading.py of 0.42.  What the model holds meanwhile is memory
    that nobody has written to.
    """
    hooks = [hook for one in model.modules() for hook in getattr(vars(one).get(_GROUPS), "hooks", {}).values()]
    return any(getattr(getattr(hook, "group", None), "_is_offloaded_to_disk", False) for hook in hooks)


def device_of_calls(module: nn.Module, stored: torch.device) -> torch.device:
    """Where the module computes: where its tensors are, or what its hook brings them to."""
    device = getattr(_offloading(module), "execution_device", None) if stored.type == "meta" else None
    return stored if device is None else torch.device(device)


def value_of(module: nn.Module, parameter: str) -> Tensor:
    """A parameter with its numbers, on whichever device they are; of an offloaded one, what a call would get."""
    own = module._parameters[parameter]
    assert own is not None
    hook = _offloading(module)
    if not own.is_meta or hook is None:
        return own
    value: Tensor = hook.weights_map[parameter]
    return value.to(own.dtype)


def hide_from_hook(module: nn.Module, hidden: Callable[[str], bool]) -> None:
    """Let the hook of an offloaded module leave some parameters where they are: trained ones must stay one object.

    Args:
        module: of anything else than an offloaded one nothing is changed.
        hidden: whether it is to leave alone a parameter of that name.
    """
    if is_offloaded(module):
        hook: Any = vars(module)[_HOOK]
        kind: Any = type(hook)
        hook.__class__ = _hiding(kind, hidden)


def show_to_hook(module: nn.Module) -> None:
    """Undo `hide_from_hook`."""
    hook = vars(module).get(_HOOK)
    if (base := getattr(type(hook), "_onelora_base", None)) is not None:
        hook.__class__ = base


@functools.cache
def _hiding(base: Any, hidden: Callable[[str], bool]) -> Any:
    """A subclass of the class of a hook, as tools ask for the class: the hidden are off the module while it works."""

    def without(method: Any) -> Any:
        def run(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            parameters = module._parameters
            taken = {name: parameters.pop(name) for name in list(parameters) if hidden(name)}
            try:
                return method(hook, module, *args, **kwargs)
            finally:
                parameters.update(taken)

        return torch.compiler.disable(run)  # as the base's own methods are

    methods = {name: without(getattr(base, name)) for name in ("pre_forward", "post_forward", "detach_hook")}
    return subclass(f"OneLoRA{base.__name__}", (base,), {"__module__": __name__, "_onelora_base": base, **methods})
