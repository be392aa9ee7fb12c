"""Names of modules as they are in the model that was not compiled or wrapped, and PEFT's rule for matching them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from onelora_compile.kinds import WRAPPED


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by qualified name, each once, without what wrappers put in between."""
    for name, module in model.named_modules():
        yield clean_name(name), module


def clean_name(name: str) -> str:
    """A qualified name as it is in the model that was not compiled or wrapped."""
    if not any(one in name for one in WRAPPED):  # nearly all: a switch with norms asks for hundreds of names
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Parameters, by every name that they have, and buffers."""
    tensors: dict[str, Tensor] = dict(root.named_parameters(remove_duplicate=False))
    return {clean_name(name): tensor for name, tensor in (tensors | dict(root.named_buffers())).items()}


def any_match(patterns: str | Sequence[str], names: Sequence[str]) -> bool:
    """Whether PEFT's rule selects what has several names."""
    return any(matches(patterns, name) for name in names)


def matches(patterns: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: one regular expression matches whole; of a list, a name or the ending after a dot."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """A module may be registered under several names: it is selected if any matches, and known by the first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(clean_name(name))
    return names
