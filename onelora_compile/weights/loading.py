"""Adapters of files into a model: `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import is_adapted
from onelora_compile.adapting.adapter import (
    attach_selected,
    refuse_fully_sharded,
    refuse_wrapped,
    release,
    running_statistics,
    undo_adapt,
    unwrap,
    vectors,
)
from onelora_compile.adapting.adapter_state import (
    AdapterState,
    adapted_weights,
    refuse_weights_in_files,
    state_of,
    was_adapted,
)
from onelora_compile.adapting.module_names import named_tensors
from onelora_compile.adapting.pool import DEFAULT_ADAPTER, check_name
from onelora_compile.adapting.select_targets import Selection, available_targets, saved_parameters, select
from onelora_compile.adapting.trained_besides import saved_tensors
from onelora_compile.errors import AdapterFileError, OneLoRAWarning, TargetError
from onelora_compile.many_adapters.extend import as_base, refuse_replicated
from onelora_compile.many_adapters.names import put_adapter
from onelora_compile.many_adapters.values import pool_of
from onelora_compile.printable import shortened
from onelora_compile.sharded import write_whole
from onelora_compile.weights.adapter_content import AdapterFile
from onelora_compile.weights.adapter_file import read_adapter
from onelora_compile.weights.file_kinds import GGUF_FILE
from onelora_compile.weights.fits_model import check_model, left_to_the_base, on_the_base, unchecked
from onelora_compile.weights.gguf_layout import layout_of_model
from onelora_compile.weights.gguf_read import read_gguf
from onelora_compile.weights.hub_download import Token, local_adapter

Model = TypeVar("Model", bound=nn.Module)
PathLike = str | os.PathLike[str]


def load_adapter(
    model: Model,
    path: PathLike,
    approximate: bool = False,
    *,
    adapter_name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
) -> Model:
    """Load an adapter file, a folder of PEFT, or one on the Hub into a model; a compiled one is not compiled again.

    Of a model that is sharded over processes every process must call this, and can read the file. A model that is
    not adapted yet is adapted as the file says. Everything is checked before the first value is
    written: after an error the model is as it was. A folder that PEFT wrote does not know its base: that this can't be
    checked is a `OneLoRAWarning`; names and shapes are checked.

    Args:
        model: the model, plain or compiled, adapted or not.
        path: a file of `save_adapter`; a folder of PEFT: LoRA whose lora_A is constant, MiSS or Bone of r=1; a LoRA of
            that kind for llama.cpp, `.gguf`, if the model's form there is known (needs the package gguf), or of
            diffusers for this model of a pipeline; a folder that holds `onelora.safetensors`; or, where nothing of that
            name is here, an id on the Hub, "owner/name", of a repository with one of these. The Hub needs the package
            huggingface_hub.
        approximate: take the best vector of each layer of a LoRA that is more than that, b = ΔW 1 / in_features; a
            `OneLoRAWarning` says which share of ‖ΔW‖² that keeps.
        adapter_name: under which the model holds it, beside the adapters that it has; it waits until `set_adapter`,
            or in a `rows` block. The first adapter of a model is the active one, and other values of the active one
            are written at once, with a scale of 1. It may be on other linears than they: the model gets vectors there,
            which are zero for the others, and a compiled model is captured anew then. None is the active adapter;
            where it is the only one, the file has to be on the linears that the model is adapted on.
        revision: of an id: a branch, a tag or a commit; None is the default branch.
        subfolder: the folder in the repository, or in the folder, that holds the adapter.
        token: of an id, for what is private: a token, or False for none; None is the one that you are logged in with.

    Returns:
        The same object.

    Raises:
        AdapterFileError: a damaged file, a newer format, other modules or shapes than the model's, NaN or infinity, an
            adapter of PEFT or llama.cpp that vectors can't hold, a repository without an adapter.
        FileNotFoundError: there is no such file, and the Hub does not give it; the message says why.
        BaseMismatchError: the adapter was trained on another base.
        StateError: a `disabled` block is open, or a `rows` block that uses the adapter of that name; it is on further
            linears, or the model is not adapted yet, and DistributedDataParallel holds the model.
        ConfigError: the name is no string, or empty; a revision of what is here.
    """
    if adapter_name is not None:
        check_name(adapter_name)
    root = unwrap(model)
    file = _read_for(root, local_adapter(path, revision, subfolder, token), approximate)
    if adapted_weights(root) and (adapter_name or _has_several(root)):
        state = state_of(root, "load")
        _load_beside(model, state, file, path, adapter_name or state.pool.active)
    else:
        _load_as_active(model, file, path, adapter_name or DEFAULT_ADAPTER)
    if file.projection is not None:
        warnings.warn(f"{path} was approximated: vectors keep {file.projection.text}", OneLoRAWarning, stacklevel=2)
    if file.unknown:
        warnings.warn(unchecked(root, file, path), OneLoRAWarning, stacklevel=2)
    return model


def _read_for(root: nn.Module, path: Path, approximate: bool) -> AdapterFile:
    """Read an adapter; the model tells how llama.cpp lays out its base."""
    if path.suffix == GGUF_FILE:
        return read_gguf(path, layout_of_model(root), approximate)
    return read_adapter(path, approximate)


def _has_several(root: nn.Module) -> bool:
    return len(pool_of(root, state_of(root, "load")).held) > 1


def _load_beside(model: nn.Module, state: AdapterState, file: AdapterFile, path: PathLike, name: str) -> None:
    """Check everything against the base, then let the model hold the adapter."""
    root = unwrap(model)
    chosen = _chosen_like(root, file, path)
    named = named_tensors(root)
    trained = {key: named[key] for key in [*chosen.saved, *running_statistics(root, chosen)]}
    check_model(root, on_the_base(chosen.targets, state.originals), trained, file, path)
    refuse_replicated(model, chosen)
    put_adapter(root, state, name, file.config, chosen, file.vectors, file.saved)


def _load_as_active(model: nn.Module, file: AdapterFile, path: PathLike, name: str) -> None:
    root = unwrap(model)
    fresh, new = not adapted_weights(root), not was_adapted(root)
    if fresh:
        refuse_fully_sharded(root, "load the adapter before fully_shard")
        refuse_wrapped(model, "load the adapter into the model before you wrap it")
        refuse_weights_in_files(root, "load an adapter")
    state = attach_like(root, file, path) if fresh else state_of(root, "load")
    try:
        targets = on_the_base(adapted_weights(root), state.originals)
        check_model(root, targets, saved_tensors(root, state), file, path)
    except Exception:
        if new:
            undo_adapt(root)  # a compiled call adapts it still
        elif fresh:
            release(root, state)
        raise
    current: dict[str, Tensor] = {**vectors(root), **saved_tensors(root, state)}
    values = {name: state.originals[name] for name in left_to_the_base(state.originals, file)} | file.tensors
    with torch.inference_mode(False), torch.no_grad():
        for key, value in values.items():
            write_whole(current[key], value)
    state.pool.scale = 1.0
    state.pool.changes.follow(module for module in root.modules() if is_adapted(module))
    state.pool.changes.switch()
    if fresh:
        state.pool.active = name


def attach_like(root: nn.Module, file: AdapterFile, path: PathLike) -> AdapterState:
    """Adapt exactly the modules that the file has vectors for.

    Raises:
        AdapterFileError: the model has no linear of that name, or is laid out otherwise.
    """
    attach_selected(root, _chosen_like(root, file, path), file.config)
    return state_of(root, "load")


def _chosen_like(root: nn.Module, file: AdapterFile, path: PathLike) -> Selection:
    """The selection of what the file has vectors for.

    Raises:
        AdapterFileError: the model has no linear of that name, or is laid out otherwise.
    """
    present = adapted_weights(root)
    try:
        if all(name in present for name in file.vectors):
            # Of hundreds of adapters each would follow the code again, and other threads may run the model.
            return Selection({name: present[name] for name in file.vectors}, saved_parameters(root, file.config), {})
        with as_base(root):
            return _selected(root, file, path)
    except TargetError as error:
        raise AdapterFileError(f"{path} does not fit {type(root).__name__}: {error}") from error


def _selected(root: nn.Module, file: AdapterFile, path: PathLike) -> Selection:
    offered = available_targets(root, file.config)
    if missing := [name for name in file.vectors if name not in offered]:
        raise AdapterFileError(
            f"{path} has vectors for linears that {type(root).__name__} does not have: {shortened(missing)}. "
            f"It has: {shortened(offered)}"
        )
    chosen = select(root, dataclasses.replace(file.config, target_modules=list(file.vectors), exclude_modules=None))
    if twice := [name for name in file.vectors if name not in chosen.targets]:
        raise AdapterFileError(
            f"{path} has vectors for {shortened(twice)}, which its modules_to_save train as a whole: a linear has "
            "one or the other. The program that wrote it has to save it again"
        )
    return dataclasses.replace(chosen, targets={name: chosen.targets[name] for name in file.vectors})
