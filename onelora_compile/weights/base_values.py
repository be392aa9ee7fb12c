"""Values of the base from its own file, for what an adapter file knows by fingerprint alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
from torch import Tensor

from onelora_compile.errors import BaseMismatchError, ConfigError
from onelora_compile.file_names import as_path
from onelora_compile.weights.combine_trained import BaseValue
from onelora_compile.weights.file_kinds import no_safetensors
from onelora_compile.weights.fingerprint import Fingerprint, fingerprint_of_values


def base_values(base: str | os.PathLike[str] | Mapping[str, Tensor]) -> BaseValue:
    """What gives the value of a tensor of the base: by its name, its other names, and its fingerprint if it is known.

    The values are read from the file when they are asked for. What gives them raises ConfigError where the base has no
    such tensor, and BaseMismatchError where it is not the one of the fingerprint.

    Args:
        base: a .safetensors file of the model, or its `state_dict()`.

    Raises:
        ConfigError: it is neither, or the file is damaged.
        FileNotFoundError: there is no such file.
    """
    where = "the mapping" if isinstance(base, Mapping) else str(base)
    names, read = (set(base), base.__getitem__) if isinstance(base, Mapping) else _opened(as_path(base, "base"))

    def value(name: str, others: Sequence[str], known: Fingerprint | None) -> Tensor:
        found = next((one for one in (name, *others) if one in names), None)
        if found is None:
            raise ConfigError(f"base: {where} has no {name!r}: give the state_dict of the model, by its own names")
        tensor = read(found)
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"base: {found!r} of {where} is no tensor but a {type(tensor).__name__}")
        if known is not None and not fingerprint_of_values(tensor).agrees(known):
            raise BaseMismatchError(f"base: {found!r} of {where} is not the value that the adapters were trained from")
        return tensor.detach().cpu()

    return value


def _opened(path: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    """The names in a file of tensors, and what reads one of them."""
    if not path.is_file():
        raise FileNotFoundError(f"base: there is no file {path}")
    try:
        file = safetensors.safe_open(path, framework="pt")
        return set(file.keys()), file.get_tensor
    except safetensors.SafetensorError as error:
        raise ConfigError(f"base: {no_safetensors(path, error)}") from error
