"""The code that a call of a module runs: its forward and its hooks, each as a function of plain values."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Some code that runs when a module is called.

    Attributes:
        run: takes the module, and values for the arguments.
        forward: whether this is the module's forward, not a hook.
        arguments: the numbers of values that make a difference: those that it needs, and all.
        by_place: the same with all values by their place, for a wrapper that hands them on so; None for a hook.
    """

    run: Callable[..., Any]
    forward: bool
    arguments: tuple[int, ...]
    by_place: Entry | None = None


def entries(module: nn.Module) -> Iterator[Entry]:
    """The code that a call of a module runs: its forward, of the instance or of the class, and its hooks."""
    kind: Any = type(module)
    own = vars(module).get("forward")
    if own is None:
        yield _entry(kind.forward, 1)
    elif getattr(own, "__self__", None) is module:
        yield _entry(own.__func__, 1)
    else:
        yield _entry(own, 0)
    if kind.__call__ is not nn.Module.__call__:
        yield dataclasses.replace(_entry(kind.__call__, 1), forward=False)
    with_keywords = getattr(module, "_forward_pre_hooks_with_kwargs", {})
    for key, hook in [(key, _code_of(hook)) for key, hook in module._forward_pre_hooks.items()]:
        named: tuple[Any, ...] = ({},) if key in with_keywords else ()
        yield Entry(lambda self, x, hook=hook, named=named: hook(self, (x,), *named), False, (1,))
    with_keywords = getattr(module, "_forward_hooks_with_kwargs", {})
    for key, hook in [(key, _code_of(hook)) for key, hook in module._forward_hooks.items()]:
        named = ({},) if key in with_keywords else ()
        yield Entry(lambda self, x, y, hook=hook, named=named: hook(self, (x,), *named, y), False, (2,))


def _code_of(hook: Any) -> Any:
    """What a hook runs: a call of a module is not followed."""
    return hook.forward if isinstance(hook, nn.Module) else hook


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of a module's forward that are not PyTorch's."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    homes = [getattr(hook, "__module__", None) or type(hook).__module__ for hook in hooks]
    return [hook for hook, home in zip(hooks, homes, strict=True) if not str(home).startswith("torch.")]


def _entry(function: Callable[..., Any], bound: int) -> Entry:
    """A function whose first `bound` arguments are the module, as one that takes plain values."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):  # of no signature
        parameters = [inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY)]
    first = [one for one in parameters if one.kind in _POSITIONAL]
    needed = [one for one in parameters if one.default is one.empty and one.kind in (*_POSITIONAL, one.KEYWORD_ONLY)]
    others = [one for one in (*first, *(p for p in parameters if p.kind is p.KEYWORD_ONLY)) if one not in needed]
    others = [one for one in others if "dict" not in str(one.annotation).lower()]  # a tensor is none
    if not needed:  # forward(input_ids=None, inputs_embeds=None) wants one of them
        needed, others = others[:1], others[1:]
    if not needed and any(one.kind is one.VAR_POSITIONAL for one in parameters):
        needed = [inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY)]
    order = [*needed, *others]

    def run(self: nn.Module, *values: Any) -> Any:
        given = list(zip(order, values, strict=False))
        # The first by its place, as any decorator hands it on; the others by name, past what stands between them.
        alone = [v for i, (p, v) in enumerate(given) if p.kind is p.POSITIONAL_ONLY or (i == 0 and p is first[:1][0])]
        named = {p.name: v for i, (p, v) in enumerate(given) if len(alone) <= i}
        return function(*((self,) if bound else ()), *alone, **named)

    def by_place(self: nn.Module, *values: Any) -> Any:
        return function(*((self,) if bound else ()), *values)

    counts = tuple(dict.fromkeys((len(needed), len(order))))
    return Entry(run, True, counts, Entry(by_place, True, (len(first),)))
