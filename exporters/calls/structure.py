"""Containers that models take and return: names of their parts, and how to put others in their place.

A cache of transformers is a container too: its layers hold tensors, and a call changes them in place.  So a container
is always rebuilt, never shared: the caller's own does not see what a captured or a verified call does to the copy.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from onelora_compile.errors import ExportError

Path = tuple[str, ...]
PAST, PRESENT = "past_key_values", "present"  # a cache before and after a call, as optimum calls it
_CONSTANTS: tuple[type, ...] = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
)
_CONSTANTS += (torch.SymInt, torch.SymFloat, torch.SymBool, torch.memory_format, enum.Enum, slice, range)
_COUNTERS = ("cumulative_length", "cumulative_length_int")
_PAIRS: dict[int, tuple[str, ...]] = {
    2: ("key", "value"),
    4: ("decoder.key", "decoder.value", "encoder.key", "encoder.value"),
}


class Level(NamedTuple):
    """The parts of a container, by name, and what makes such a container of other parts."""

    names: list[str]
    parts: list[Any]
    rebuild: Callable[[list[Any]], Any]


def mapped(value: Any, change: Callable[[Path, Tensor], Any], path: Path = ()) -> Any:
    """A copy of a value with every tensor in it changed; `change` gets the tensor and its path."""
    if isinstance(value, Tensor):
        return change(path, value)
    level = level_of(value, path)
    if level is None:
        if not isinstance(value, _CONSTANTS):
            raise ExportError(
                f"{'.'.join(path) or 'the result'} is a {type(value).__name__}, in which tensors can't be found: use a "
                "tuple, a mapping, a dataclass, or register the class with torch.utils._pytree.register_pytree_node"
            )
        return value
    named = zip(level.names, level.parts, strict=True)
    return level.rebuild([mapped(part, change, (*path, name)) for name, part in named])


def tensors_in(value: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """The tensors of a value with their paths, in order."""
    found: list[tuple[Path, Tensor]] = []

    def note(where: Path, tensor: Tensor) -> Tensor:
        found.append((where, tensor))
        return tensor

    mapped(value, note, path)
    return found


def level_of(value: Any, path: Path = ()) -> Level | None:
    """One level of a container; None for what is none."""
    if is_cache(value):
        return _cache_level(value)
    if _is_layer(value):
        return _layer_level(value)
    if isinstance(value, Mapping):
        return _mapping_level(value)
    pairs, spec = _one_level(value)
    if pairs is not None:
        names, parts = [name for name, _ in pairs], [part for _, part in pairs]
        legacy = path[-2:-1] == (PAST,) and all(isinstance(part, Tensor) for part in parts)
        if legacy and isinstance(value, (tuple, list)) and len(parts) in _PAIRS:
            names = list(_PAIRS[len(parts)])
        return Level(names, parts, lambda new: pytree.tree_unflatten(new, spec))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return Level(names, [getattr(value, name) for name in names], lambda new: _with_attributes(value, names, new))
    return None


def _one_level(value: Any) -> tuple[list[tuple[str, Any]] | None, Any]:
    """Names and parts of what PyTorch knows as a container, None of what it does not."""
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda one: one is not value)
    if len(parts) == 1 and parts[0] is value:
        return None, None
    try:
        keyed, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda one: one is not value)
        return [(_key(path[0]), part) for path, part in keyed], spec
    except ValueError:  # registered without names
        return [(str(index), part) for index, part in enumerate(parts)], spec


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):  # of a mapping, a sequence, an object
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry).strip(".[]'\"")


def _mapping_level(value: Mapping[Any, Any]) -> Level:
    names, parts = [str(key) for key in value], list(value.values())
    children, spec = pytree.tree_flatten(value, is_leaf=lambda one: one is not value)
    if len(children) == len(parts) and all(a is b for a, b in zip(children, parts, strict=True)):
        return Level(names, parts, lambda new: pytree.tree_unflatten(new, spec))

    def rebuild(new: list[Any]) -> Any:
        other: Any = copy.copy(value)
        for key, part in zip(value, new, strict=True):
            other[key] = part
        return other

    return Level(names, parts, rebuild)


def _with_attributes(value: Any, names: Sequence[str], parts: Sequence[Any]) -> Any:
    other = copy.copy(value)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(other, name, part)  # also of a frozen dataclass
    return other


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache of transformers."""
    module = sys.modules.get("transformers.cache_utils")  # no model has one that has not imported it
    return module is not None and isinstance(value, module.Cache)


def _cache_level(cache: Any) -> Level:
    if hasattr(cache, "self_attention_cache"):
        return _two_caches_level(cache)

    def rebuild(layers: list[Any]) -> Any:
        other = copy.copy(cache)
        other.layers = layers
        return other

    return Level([str(index) for index in range(len(cache.layers))], list(cache.layers), rebuild)


def _two_caches_level(cache: Any) -> Level:
    """Of an encoder-decoder: both caches of each layer, as `0.decoder.key` and `0.encoder.key`."""
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    names = [f"{index}.{role}" for role, one in (("decoder", own), ("encoder", cross)) for index in range(len(one))]

    def rebuild(layers: list[Any]) -> Any:
        other = copy.copy(cache)
        other.is_updated = dict(cache.is_updated)
        other.self_attention_cache, other.cross_attention_cache = copy.copy(own), copy.copy(cross)
        other.self_attention_cache.layers = layers[: len(own)]
        other.cross_attention_cache.layers = layers[len(own) :]
        return other

    return Level(names, [*own.layers, *cross.layers], rebuild)


def _is_layer(value: Any) -> bool:
    module = sys.modules.get("transformers.cache_utils")
    kinds = ("CacheLayerMixin", "LinearAttentionCacheLayerMixin", "DummyLayer")
    return module is not None and isinstance(
        value, tuple(getattr(module, one) for one in kinds if hasattr(module, one))
    )


def _layer_level(layer: Any) -> Level:
    if not layer.is_initialized:  # it makes its tensors at the first call
        return Level([], [], lambda _: copy.deepcopy(layer))
    held = {name: value for name, value in vars(layer).items() if not name.startswith("_") and _holds_tensors(value)}

    def rebuild(new: list[Any]) -> Any:
        other = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, (dict, list)):
                setattr(other, name, copy.copy(value))
        for name, part in zip(held, new, strict=True):
            setattr(other, name, part)
        for name in _counters(layer):
            setattr(other, name, other.keys.shape[-2])
        return other

    return Level([{"keys": "key", "values": "value"}.get(name, name) for name in held], list(held.values()), rebuild)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(isinstance(part, Tensor) for part in value.values())
    return isinstance(value, Tensor)


def _counters(layer: Any) -> list[str]:
    """Counts of tokens that are Python numbers, and that can be told from the size of the keys."""
    return [name for name in _COUNTERS if type(getattr(layer, name, None)) is int and _seen(layer, name)]


def _seen(layer: Any, name: str) -> bool:
    return isinstance(layer.keys, Tensor) and bool(getattr(layer, name) == layer.keys.shape[-2])


def check_counters(value: Any, name: str) -> None:
    """Refuse a cache whose length is a number that would be a constant of the file.

    Raises:
        ExportError: it is a static cache with a sliding window, or one that has seen more tokens than it holds.
    """
    for index, layer in enumerate(_layers(value)):
        for counter in _COUNTERS:
            count = getattr(layer, counter, None)
            if layer.is_initialized and type(count) is int and not _seen(layer, counter):
                raise ExportError(
                    f"layer {index} of the cache {name!r} ({type(layer).__name__}) counts its tokens as a Python "
                    f"number ({count}), so the file would be right for that number alone: export with a DynamicCache "
                    "that holds fewer tokens than the window"
                )


def _layers(value: Any) -> list[Any]:
    if not is_cache(value):
        return []
    if hasattr(value, "self_attention_cache"):
        return [*value.self_attention_cache.layers, *value.cross_attention_cache.layers]
    return list(value.layers)
