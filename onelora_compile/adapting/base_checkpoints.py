"""A state_dict of the base goes into an adapted model, and the vectors stay as they are.

A hook of the model, not of its adapted modules: each of those sees its own part alone, and a checkpoint that has
some of the vectors is none of the base; what it lacks is missing, as PyTorch says.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from onelora_compile.adapting.adapted_module import is_vector


def take_base_checkpoints(root: nn.Module) -> None:
    """Let `load_state_dict` of an adapted model take what has no vector at all, with strict=True too."""
    root.register_load_state_dict_post_hook(_vectors_stay)


def forget_base_checkpoints(root: nn.Module) -> None:
    """Undo `take_base_checkpoints`."""
    hooks = root._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _vectors_stay]:
        del hooks[key]


def _vectors_stay(root: nn.Module, found: Any) -> None:
    own = sum(_names_vector(name) for name, _ in root.named_parameters(remove_duplicate=False))
    if sum(map(_names_vector, found.missing_keys)) == own:
        found.missing_keys[:] = [name for name in found.missing_keys if not _names_vector(name)]


def _names_vector(name: str) -> bool:
    return is_vector(name.rpartition(".")[2])
