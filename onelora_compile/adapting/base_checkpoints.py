"""A state_dict of the base goes into an adapted model, and the vectors stay as they are.

Its heads, norms and statistics are the base's from then on, for `disabled`, `detach` and files, as its weights are.

A hook of the model, not of its adapted modules: each of those sees its own part alone, and a checkpoint that has
some of the vectors is none of the base; what it lacks is missing, as PyTorch says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onelora_compile.adapting.adapted_module import is_vector
from onelora_compile.adapting.adapter_state import state_or_none
from onelora_compile.adapting.module_names import clean_name
from onelora_compile.sharded import whole


def take_base_checkpoints(root: nn.Module) -> None:
    """Let `load_state_dict` of an adapted model take what has no vector at all, with strict=True too."""
    root.register_load_state_dict_post_hook(_vectors_stay)


def forget_base_checkpoints(root: nn.Module) -> None:
    """Undo `take_base_checkpoints`."""
    hooks = root._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _vectors_stay]:
        del hooks[key]


def _vectors_stay(root: nn.Module, found: Any) -> None:
    vectors = {n: p for n, p in root.named_parameters(remove_duplicate=False) if _names_vector(n)}
    own = list(vectors)
    missing = [name for name in found.missing_keys if _names_vector(name)]
    if own and len(missing) == len(own):
        found.missing_keys[:] = [name for name in found.missing_keys if not _names_vector(name)]
        # In the names of a model around this one, all of them with the same beginning.
        _remember(root, min(missing).removesuffix(min(own)), set(found.missing_keys))
    elif not found.missing_keys and _is_unknown(root) and not any(whole(p.detach()).any() for p in vectors.values()):
        _remember(root, "", set())  # torch.distributed fills a checkpoint of the base up with the zeros of the model


def _is_unknown(root: nn.Module) -> bool:
    """Whether the model was on the meta device at `adapt`, and is not any more."""
    state = state_or_none(root)
    unknown = state is not None and any(one.is_meta for one in state.originals.values())
    return unknown and not any(parameter.is_meta for parameter in root.parameters())


def _remember(root: nn.Module, prefix: str, missing: set[str]) -> None:
    """What was loaded is what trained parameters and statistics were before training."""
    state = state_or_none(root)
    originals = {} if state is None else state.originals
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers()]:
            if clean_name(name) in originals and prefix + name not in missing:
                originals[clean_name(name)] = whole(tensor.detach()).clone()


def _names_vector(name: str) -> bool:
    return is_vector(name.rpartition(".")[2])
