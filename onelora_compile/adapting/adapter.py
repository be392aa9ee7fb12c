"""Adapting a model in place: vectors on its linears, the base frozen, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from onelora_compile.adapting.adapted_module import detach_vectors, is_adapted, made_by_attach
from onelora_compile.adapting.adapter_state import (
    STATE,
    AdapterState,
    adapted_weights,
    mark,
    refuse_offloaded_vectors,
    refuse_weights_in_files,
    state_of,
    state_or_none,
    unmark,
)
from onelora_compile.adapting.base_checkpoints import forget_base_checkpoints, take_base_checkpoints
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.dead_vectors import watch
from onelora_compile.adapting.dispatched import is_offloaded
from onelora_compile.adapting.module_names import clean_name, named_modules
from onelora_compile.adapting.pool import DEFAULT_ADAPTER, check_name
from onelora_compile.adapting.select_targets import Selection, select
from onelora_compile.adapting.stand_ins import meant
from onelora_compile.adapting.torch_fast_paths import close_fast_paths
from onelora_compile.adapting.trained_besides import all_saved_tensors, saved_tensors
from onelora_compile.adapting.weight_target import attach
from onelora_compile.errors import StateError, TargetError
from onelora_compile.sharded import is_fully_sharded, is_sharded, whole

Model = TypeVar("Model", bound=nn.Module)


def adapt(model: Model, config: OneLoRAConfig | None = None, *, adapter_name: str = DEFAULT_ADAPTER) -> Model:
    """Put a zero vector on every selected linear and freeze everything else.

    In place. The vectors are ordinary parameters (`<module>.onelora_vector`), so `.to`, `state_dict`, `deepcopy`
    and optimizers see them; a model that was compiled before is captured anew at its next call.

    Args:
        model: the model, plain or compiled.
        config: what to adapt; None is `OneLoRAConfig()`: every linear but the output head.
        adapter_name: of the adapter, which counts where the model gets others beside it.

    Returns:
        The same object.

    Raises:
        StateError: the model, or a part of it, is adapted already, `fully_shard` or FullyShardedDataParallel has split
            it, or DistributedDataParallel holds it.
        ConfigError: the name is no string, or empty, or `config` is no `OneLoRAConfig`.
        TargetError: the selection is empty or can't be adapted; the message lists what the model offers.
    """
    root = unwrap(model)
    if adapted := adapted_weights(root):
        raise StateError(
            f"the model is adapted already ({len(adapted)} vectors, the first on {next(iter(adapted))!r}). "
            "To start over call onelora.detach(model) first; to keep the vectors call onelora.merge(model); "
            "to load other values use onelora.load_adapter(model, path); for one more adapter beside it "
            "onelora.add_adapter(model, name)"
        )
    check_name(adapter_name)
    refuse_fully_sharded(root, "call onelora.adapt before fully_shard")
    refuse_wrapped(model, "call onelora.adapt on the model before you wrap it")
    refuse_weights_in_files(root, "adapt")
    config = OneLoRAConfig() if config is None else config
    attach_selected(root, select(root, config), config)
    state_of(root, "name").pool.active = adapter_name
    return model


def attach_selected(root: nn.Module, selection: Selection, config: OneLoRAConfig) -> None:
    """Carry out a selection: freeze, mark what is trained besides, attach zero vectors, remember the way back."""
    parameters = {clean_name(name): parameter for name, parameter in root.named_parameters(remove_duplicate=False)}
    tensors = parameters | {clean_name(name): buffer for name, buffer in root.named_buffers()}
    travelling = [*selection.saved, *running_statistics(root, selection)]
    _refuse_offloaded(root, travelling)
    # inference_mode(False): tensors made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        originals = {name: whole(tensors[name].detach()).clone() for name in travelling}
        state = AdapterState(config, {n: p.requires_grad for n, p in parameters.items()}, originals)
        state.skipped, state.not_linear = dict(selection.skipped), dict(selection.not_linear)
        state.uses, state.made = dict(selection.uses), list(selection.targets)
        mark(root, state)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for name in selection.saved:
            parameters[name].requires_grad_(True)
        attach(list(selection.targets.values()), config.vector_dtype)
    take_base_checkpoints(root)
    state.fast_paths = close_fast_paths(root)
    callers = {name: target.module for name, target in selection.targets.items() if target.called}
    model = weakref.ref(root)  # the hooks that this sets are the model's own

    def present() -> dict[str, nn.Parameter]:
        return {} if (alive := model()) is None else vectors(alive)

    watch(present, callers, lambda: state.constant, not config.train_norms, lambda: state.pool.block.mixed)


def _refuse_offloaded(root: nn.Module, trained: Iterable[str]) -> None:
    """Accelerate makes a new parameter for every call of an offloaded module, so nothing would be trained."""
    names = set(trained)
    for prefix, module in named_modules(root):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()] if is_offloaded(module) else ():
            if tensor is not None and tensor.is_meta and (full := f"{prefix}.{name}".removeprefix(".")) in names:
                raise TargetError(
                    f"{full!r} is to be trained (modules_to_save, train_norms, or statistics of a batch norm), but "
                    "accelerate has offloaded it: keep its module in memory with device_map, or leave it out"
                )


def detach(model: Model) -> Model:
    """Remove the vectors: the model is the base again, bit for bit.

    Also restores what modules_to_save, train_norms and batch-norm statistics changed, and which parameters
    require a gradient. One attribute stays, `_onelora_state`, None on the model and False on those in it. It keeps the
    next compiled call from adapting them, their copies and their pickles again, which nothing beside them could.

    Returns:
        The same object.

    Raises:
        StateError: the model is not adapted, or a `disabled` block is open.
    """
    root = unwrap(model)
    state = state_of(root, "detach", allow_lost=True)
    refuse_sharded(root, "detach", "save the adapter, and build the model anew")
    for name, module in named_modules(root):
        if is_adapted(module) and not made_by_attach(module):
            raise StateError(
                f"can't detach: {name!r} is a {type(module).__name__} now, another class than adapt gave it "
                "(parametrized, or wrapped by a tool): undo that first, or detach before it"
            )
    tensors = all_saved_tensors(root, state)
    with torch.inference_mode(False), torch.no_grad():
        for name, original in state.originals.items():
            tensors[name].copy_(original)
    release(root, state)
    return model


def release(root: nn.Module, state: AdapterState) -> None:
    """Take the vectors off and give the base its requires_grad flags back; values stay as they are."""
    for module in [module for module in root.modules() if is_adapted(module)]:
        detach_vectors(module)
    forget_base_checkpoints(root)
    for module, attribute, value in state.fast_paths:
        setattr(module, attribute, value)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if (flag := state.requires_grad.get(clean_name(name))) is not None:
            with torch.inference_mode(parameter.is_inference()):  # what was made there can be set to True there alone
                parameter.requires_grad_(flag)
    # The mark stays: a model whose vectors were removed on purpose is not adapted again by its next compiled call.
    # On the model and not in a set of this package: copies and pickles of the model have it too.
    setattr(root, STATE, None)


def undo_adapt(root: nn.Module) -> None:
    """As if `adapt` had not been called: `detach`, and the next compiled call adapts the model again."""
    detach(root)
    unmark(root)


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The vectors, float [out_features] each ([experts, out_features] for the 3-D weights of experts).

    The name is that of the module whose `weight` is adapted, or of the parameter if it has another name.
    They are the parameters themselves, not copies. Empty for a model that is not adapted.
    """
    return {name: meant(target.vector) for name, target in adapted_weights(unwrap(model)).items()}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get: the vectors and whatever modules_to_save and train_norms train.

    Of a model that holds several adapters it is what the active one is on, and nothing that only others train.

    Raises:
        StateError: the model is not adapted, so that its whole base would be trained.
    """
    root = unwrap(model)
    if not (present := adapted_weights(root)):
        raise StateError(
            "the model is not adapted yet: call onelora.adapt(model) before you build the optimizer, or run a model "
            "compiled with backend='onelora' once"
        )
    refuse_offloaded_vectors(root, present, "train")
    others = _of_other_adapters(root)
    parameters = [meant(parameter) for parameter in root.parameters() if parameter.requires_grad]
    return [parameter for parameter in parameters if id(parameter) not in others]


def _of_other_adapters(root: nn.Module) -> set[int]:
    """The identities of what other adapters of the model train, and the active one does not."""
    found: set[int] = set()
    for _, part in named_modules(root):
        state = state_or_none(part)
        if state is not None and state.pool.held:
            own = state.pool.held[state.pool.active]
            tensors = {name: one.vector for name, one in adapted_weights(part).items()} | saved_tensors(part, state)
            mine = {*own.vectors, *own.saved}
            found |= {id(meant(one)) for one in tensors.values()}
            found -= {id(meant(one)) for name, one in tensors.items() if name in mine}  # by any of its names
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside a compiled one (`torch.compile` returns an `OptimizedModule`) or inside DDP."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        return model
    inner = model._modules.get("_orig_mod")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    return unwrap(inner) if inner is not None else model


def is_replicated(model: nn.Module) -> bool:
    """Whether a model is given inside DDP, which reduces the gradients of the parameters that it was built with."""
    inner = model._modules.get("_orig_mod")
    return isinstance(model, nn.parallel.DistributedDataParallel) or (inner is not None and is_replicated(inner))


def refuse_wrapped(model: nn.Module, remedy: str) -> None:
    """DistributedDataParallel reduces the parameters that it was built with: each process would train its own vectors.

    Raises:
        StateError: it is around the model or a part of it, or calls the model now.
    """
    kind: Any = nn.parallel.DistributedDataParallel
    if kind._get_active_ddp_module() is not None or any(isinstance(module, kind) for module in model.modules()):
        raise StateError(
            f"can't adapt a {type(unwrap(model)).__name__} inside DistributedDataParallel, which would not reduce the "
            f"gradients of vectors that are not there yet: {remedy}"
        )


def refuse_fully_sharded(root: nn.Module, remedy: str) -> None:
    """fully_shard changes the classes of modules too, and keeps the shards to itself; so does FullyShardedDataParallel.

    Raises:
        StateError: one of them has split the model.
    """
    if is_fully_sharded(root):
        raise StateError(
            f"can't adapt a {type(root).__name__} that fully_shard or FullyShardedDataParallel has split over "
            f"processes, which would not reduce the gradients of new vectors: {remedy}"
        )


def refuse_sharded(root: nn.Module, purpose: str, remedy: str) -> None:
    """What needs the whole of each parameter.

    Raises:
        StateError: a parameter of the model is split over processes.
    """
    if (name := next((name for name, p in root.named_parameters() if is_sharded(p)), None)) is not None:
        raise StateError(f"can't {purpose} a model that is sharded over processes ({name!r} is): {remedy}")


def running_statistics(root: nn.Module, selection: Selection) -> list[str]:
    """Persistent buffers that training moves: of batch norms, and of everything under modules_to_save."""
    saved_owners = {name.rpartition(".")[0] for name in selection.saved}
    names = []
    for prefix, module in root.named_modules():
        owner = clean_name(prefix)
        tracked = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if tracked or owner in saved_owners:
            own = [name for name, buffer in module._buffers.items() if buffer is not None]
            persistent = [name for name in own if name not in module._non_persistent_buffers_set]
            names += [f"{owner}.{name}" if owner else name for name in persistent]
    return names
