"""What a model takes and gives, as tensors with names: those of the ONNX file.

inputs    the argument's name, and the way into it: `input_ids`, `boxes.0`, `past_key_values.0.key`
outputs   the keys of a mapping, a dataclass or a named tuple: `logits`, `hidden_states.0`; `present.0.key` of a
          cache; `output_0`, `output_1` of a plain tuple; `output` of a tensor
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters.calls.structure import PAST, PRESENT, Path, check_counters, is_cache, mapped, tensors_in
from onelora_compile.kinds import as_args


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a model, and the tensors in them by name, in order.

    Attributes:
        arguments: value of each argument by its own name, also of `*args` and of those in `**kwargs`.
        args: positional arguments.
        kwargs: keyword arguments.
        tensors: all tensors in them, by name.
    """

    arguments: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any] | Tensor, kwargs: Mapping[str, Any] | None = None) -> Call:
        """The call of a model with these arguments.

        Raises:
            ConfigError: `kwargs` is no mapping.
        """
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ConfigError(f"kwargs must be a mapping of argument names to values, got {kwargs!r}")
        args, kwargs = as_args(args), dict(kwargs or {})
        positional, starred = _positional_names(model, len(args))
        arguments: dict[str, Any] = dict(zip(positional, args, strict=False))
        if len(args) > len(positional):
            arguments[starred] = args[len(positional) :]
        arguments |= kwargs
        found = [pair for name, value in arguments.items() for pair in tensors_in(value, (name,))]
        names = _unique(_joined(path) for path, _ in found)
        return cls(arguments, args, kwargs, dict(zip(names, _values(found), strict=True)))

    def with_tensors(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with other tensors in the places of `tensors`; nothing of the caller's is shared but constants."""
        new = iter(tensors)
        return mapped((self.args, self.kwargs), lambda _path, _tensor: next(new))

    @property
    def positional(self) -> int:
        """How many of the tensors are in positional arguments; they are the first."""
        return sum(len(tensors_in(value)) for value in self.args)

    def by_name(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Tensors in the places of `tensors`: those of `args` by position, the others by `identifiers`."""
        names = identifiers(self.tensors)[self.positional :]
        return tuple(tensors[: self.positional]), dict(zip(names, tensors[self.positional :], strict=True))

    @property
    def has_cache(self) -> bool:
        """Whether an argument is a cache, which a call changes in place."""
        return any(map(is_cache, self.arguments.values()))

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with copies of what a call may change in place."""
        return self.with_tensors([tensor.detach().clone() for tensor in self.tensors.values()])

    def check(self) -> None:
        """Refuse what can't be an input of a file.

        Raises:
            ExportError: a cache that counts in Python.
        """
        for name, value in self.arguments.items():
            check_counters(value, name)


def _values(pairs: Sequence[tuple[Path, Tensor]]) -> list[Tensor]:
    return [tensor for _, tensor in pairs]


def _positional_names(model: nn.Module, count: int) -> tuple[list[str], str]:
    """Names of the first arguments of a forward, and of its `*args`."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # compiled code has none
        parameters = []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [one.name for one in parameters if one.kind in plain]
    starred = next((one.name for one in parameters if one.kind is inspect.Parameter.VAR_POSITIONAL), "args")
    return named[:count], starred


def outputs_of(value: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, by name, in order."""
    found = tensors_in(_named_root(value))
    return dict(zip(_unique(_joined(path, renamed=PRESENT) for path, _ in found), _values(found), strict=True))


def _named_root(value: Any) -> Any:
    """A root with names: of a tensor, of the items of a plain tuple, of a cache."""
    if isinstance(value, Tensor):
        return {"output": value}
    if is_cache(value):
        return {PAST: value}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        caches = [index for index, one in enumerate(value) if is_cache(one)]
        return {PAST if caches == [index] else f"output_{index}": one for index, one in enumerate(value)}
    return value


def _joined(path: Path, renamed: str = PAST) -> str:
    return ".".join(renamed if part == PAST else part for part in path)


def _unique(names: Any) -> list[str]:
    """The names, with numbers after those that come again."""
    found: dict[str, None] = {}
    for name in names:
        number, own = 1, name
        while own in found:
            own = f"{name}_{number}"
            number += 1
        found[own] = None
    return list(found)


def plain(value: Any) -> Any:
    """The tensors that a model returned, in PyTorch's own containers: one, a tuple of them, or a mapping by name."""
    if isinstance(value, Tensor):
        return value
    found = outputs_of(value)
    unnamed = isinstance(value, (tuple, list)) and not hasattr(value, "_fields")
    return tuple(found.values()) if unnamed else found


def identifiers(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names as Python's arguments can have them: `layer.0.query` is `layer_0_query`, `0` is `_0`."""
    taken = list(taken)
    return _unique([*taken, *map(_identifier, names)])[len(taken) :]


def _identifier(name: str) -> str:
    own = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{own}" if own[:1].isdigit() else own


def flat_forward(model: nn.Module, call: Call, note: Callable[[Any], None]) -> nn.Module:
    """A module that takes the tensors of a call and returns those of the result, with the parameters of a model.

    Parameters keep their names, and what the model's forward sets on itself is set on a copy.

    Args:
        model: stays as it is.
        call: whose tensors the module takes, in order.
        note: gets what the model returned when it is called.
    """
    inner = object.__new__(type(model))
    inner.__dict__.update(model.__dict__)
    inner.__dict__["_compiled_call_impl"] = None

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        # A cache is changed in place: what it changes is a copy, and the file gives it as an output.
        args, kwargs = call.with_tensors([tensor.clone() for tensor in tensors] if call.has_cache else tensors)
        result = inner(*args, **kwargs)
        found = outputs_of(result)
        if not found:
            raise ExportError(f"{type(model).__name__} returns no tensor, so a file of it has no output")
        note(result)
        return tuple(found.values())

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = identifiers(call.tensors)
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    flat = nn.Module()
    shared = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")
    flat.__dict__.update({name: getattr(model, name) for name in shared})
    flat.forward = forward
    return flat
