"""A state_dict of the base goes into an adapted model, and the vectors stay as they are.

Its heads, norms and statistics are the base's from then on, for `disabled`, `detach` and files, as its weights are.

A hook of the model, not of its adapted modules: each of those sees its own part alone, and a checkpoint that has
some of the vectors is none of the base. What it lacks is missing, as PyTorch says, and a warning says what to do: a
hook is not told whether the load is strict.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import is_vector
from onelora_compile.adapting.adapter_state import AdapterState, Arriving, state_or_none
from onelora_compile.adapting.module_names import clean_name, named_tensors
from onelora_compile.errors import OneLoRAWarning
from onelora_compile.printable import shortened
from onelora_compile.sharded import memory_here, whole


def take_base_checkpoints(root: nn.Module) -> None:
    """Let `load_state_dict` of an adapted model take what has no vector at all, with strict=True too."""
    root.register_load_state_dict_pre_hook(_look)
    root.register_load_state_dict_post_hook(_vectors_stay)


def forget_base_checkpoints(root: nn.Module) -> None:
    """Undo `take_base_checkpoints`."""
    for hooks in (root._load_state_dict_pre_hooks, root._load_state_dict_post_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_look, _vectors_stay)]:
            del hooks[key]


def _look(root: nn.Module, checkpoint: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Note what comes from elsewhere: afterwards its numbers are the model's, whoever they came from."""
    names = [name for name in checkpoint if name.startswith(prefix)]
    given = {clean_name(name.removeprefix(prefix)): checkpoint[name] for name in names}
    brought = {name for name, own in named_tensors(root).items() if name in given and not _is_own(given[name], own)}
    if (state := state_or_none(root)) is not None:
        state.arriving = Arriving(prefix, rest[-1], brought)


def _is_own(given: Any, own: Tensor) -> bool:
    """Whether a checkpoint has the model's own tensor, as `state_dict` gives it."""
    if not isinstance(given, Tensor) or own.is_meta:
        return isinstance(given, Tensor) and given.is_meta
    return given is own or memory_here(given) == memory_here(own) != 0


def _vectors_stay(root: nn.Module, found: Any) -> None:
    state = state_or_none(root)
    if state is None:
        return
    prefix, errors, brought = state.arriving or Arriving("", [], set())  # a loader of the user's own calls no hook
    state.arriving = None
    named = named_tensors(root)
    missing = {clean_name(name.removeprefix(prefix)) for name in found.missing_keys if name.startswith(prefix)}
    vectors = {name for name in named if _names_vector(name)}
    unknown = _is_unknown(root, state)
    of_the_base = not brought <= state.originals.keys()  # not a trained head alone
    loaded: set[str] = set()
    if vectors and vectors <= missing:
        found.missing_keys[:] = [n for n in found.missing_keys if not (n.startswith(prefix) and _names_vector(n))]
        # Of a model that was on the meta device the model's own tensors may be the base's: it got them by assign=True.
        whole_base = missing == vectors and unknown
        loaded = named.keys() - missing if of_the_base or whole_base else set()
    elif vectors and vectors.isdisjoint(brought) and of_the_base:
        # Filled up with what the model has: by torch.distributed, or `model.state_dict() | checkpoint`.
        loaded = brought
    elif not missing and unknown and not any(whole(named[name].detach()).any() for name in vectors):
        loaded = set(named)  # the same, of vectors that were copied
    if missing and missing < vectors:  # of one shard of a checkpoint more is missing
        warnings.warn(_partly(missing, len(vectors)), OneLoRAWarning, stacklevel=2)
    if not errors:  # of a load that fails something is not there, and nothing says what
        _remember(state, named, loaded)


def _partly(missing: Collection[str], count: int) -> str:
    return (
        f"the checkpoint has {count - len(missing)} of the {count} vectors of this model, without "
        f"{shortened(sorted(missing))}: it is of a model that was adapted on other linears. Adapt this one with the "
        "same OneLoRAConfig, or detach it and load the adapter's file, which knows its selection, with load_adapter"
    )


def _is_unknown(root: nn.Module, state: AdapterState) -> bool:
    """Whether the model was on the meta device at `adapt`, and is not any more."""
    unknown = any(one.is_meta for one in state.originals.values())
    return unknown and not any(parameter.is_meta for parameter in root.parameters())


def _remember(state: AdapterState, named: Mapping[str, Tensor], loaded: Collection[str]) -> None:
    """What was loaded is what trained parameters and statistics were before training."""
    with torch.inference_mode(False), torch.no_grad():
        for name in state.originals:
            if name in named and name in loaded:
                state.originals[name] = whole(named[name].detach()).clone()


def _names_vector(name: str) -> bool:
    return is_vector(name.rpartition(".")[2])
