"""Several adapters of one model, by name, of which one is active; the words are PEFT's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import is_adapted
from onelora_compile.adapting.adapter import refuse_sharded, running_statistics, unwrap
from onelora_compile.adapting.adapter_state import (
    AdapterState,
    adapted_weights,
    own_state,
    refuse_blocks,
    state_of,
    state_or_none,
)
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.pool import check_name
from onelora_compile.adapting.select_targets import Selection, saved_parameters
from onelora_compile.adapting.weight_target import vector_at
from onelora_compile.errors import ConfigError, StateError
from onelora_compile.kinds import finite_number
from onelora_compile.many_adapters.extend import extend, refuse_replicated, select_on_base
from onelora_compile.many_adapters.values import (
    live_saved,
    live_vectors,
    look_again,
    one_held,
    pool_of,
    refuse_used,
    store_active,
    write_active,
)
from onelora_compile.printable import shortened

Model = TypeVar("Model", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model.

    Attributes:
        id: its number in `rows`; it stays the same, and no other adapter of the model gets it.
        active: whether its values are those of the model.
        vectors: the linears that it is on, by the names of their vectors.
        saved: what else it trained, heads and norms, by parameter or buffer name.
        numbers: in all of that.
    """

    id: int
    active: bool
    vectors: tuple[str, ...]
    saved: tuple[str, ...]
    numbers: int


def adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The adapters of a model by name, in the order in which they came; empty for a model that is not adapted.

    Raises:
        StateError: the model itself is not adapted, but a part of it is; or layers were moved while adapters wait.
    """
    root = unwrap(model)
    state = state_or_none(root)
    if state is None:
        if any(map(is_adapted, root.modules())):
            own_state(root, "list adapters")
        return {}
    pool, found = pool_of(root, state), {}
    with pool.lock:  # other threads may add some
        look_again(root, pool)
        own = {key: vector_at(module, attribute) for key, (module, attribute) in pool.places.items()}
        for name, held in pool.held.items():
            numbers = sum(own[key].numel() for key in held.vectors) + sum(one.numel() for one in held.saved.values())
            found[name] = AdapterInfo(held.id, name == pool.active, held.vectors, tuple(held.saved), numbers)
    return found


def add_adapter(model: Model, adapter_name: str, config: OneLoRAConfig | None = None) -> Model:
    """Give an adapted model one more adapter, of zero vectors, which waits until `set_adapter`.

    Args:
        model: an adapted model, plain or compiled.
        adapter_name: a name that no adapter of the model has.
        config: what it adapts; None is all linears that have a vector, heads and norms as at the first time. Linears
            that had no vector get one, and a compiled model is captured anew then.

    Returns:
        The same object.

    Raises:
        StateError: the model is not adapted, or has an adapter of that name; a `disabled` block is open; it would have
            more to train, and DistributedDataParallel holds it.
        ConfigError: the name is no string, or empty, or `config` is no `OneLoRAConfig`.
        TargetError: as `adapt`.
    """
    root = unwrap(model)
    state = state_of(root, "add an adapter")
    if check_name(adapter_name) in pool_of(root, state).held:
        raise StateError(f"the model has an adapter {adapter_name!r} already: delete it, or take another name")
    if config is None:
        chosen = Selection(adapted_weights(root), saved_parameters(root, state.config), {})
    else:
        chosen = select_on_base(root, config)
    refuse_replicated(model, chosen)
    put_adapter(root, state, adapter_name, config or state.config, chosen, {}, {})
    return model


def put_adapter(
    root: nn.Module,
    state: AdapterState,
    name: str,
    config: OneLoRAConfig,
    selection: Selection,
    vectors: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
) -> None:
    """Let the model hold an adapter, or other values of the one of that name; those of the active one are written.

    The scale of the active one is 1 then.

    Args:
        root: the adapted model.
        state: its state.
        name: of the adapter.
        config: with which it was made.
        selection: the linears that it is on, some of which the model may have no vectors on yet.
        vectors: values by name; zero for those of the selection that are not there.
        saved: values of what it trained besides; the base's for those of the selection that are not there.
    """
    refuse_sharded(root, "hold several adapters in", "name no adapter")
    pool = pool_of(root, state)
    with pool.lock, torch.inference_mode(False):
        refuse_used(pool, name, f"write to {name!r}")
        look_again(root, pool)
        extend(root, state, selection)
        trained = [*selection.saved, *running_statistics(root, selection), *saved]
        own = {key: state.originals[key].clone() for key in trained}
        own |= {key: saved[key].to(own[key], copy=True) for key in saved}
        held = pool.put(name, config, tuple(selection.targets), own)
        live = live_vectors(root, pool)
        pool.reserve(live)
        assert pool.values is not None
        with torch.no_grad():
            pool.values[held.row].zero_()
            for row, key in zip(pool.row_of(name, live), live, strict=True):
                if key in vectors:
                    row.copy_(vectors[key])
            if name == pool.active:
                write_active(state, pool, live, live_saved(root, state), name, 1.0)


def set_adapter(model: Model, adapter_name: str, scale: float = 1.0) -> Model:
    """Make another adapter the active one: a copy into the same tensors; nothing is compiled again.

    The one that was active waits with the values that it has now. What an optimizer remembers belongs to the
    parameters and not to an adapter: take a new optimizer, or train rows (`onelora.rows`).

    Args:
        model: the model, plain or compiled.
        adapter_name: of one of `adapters(model)`.
        scale: its vectors are multiplied by it in the model, and not in files: 1 is the adapter, 0 its heads and norms
            alone, -1 its opposite. Heads and norms are not scaled.

    Returns:
        The same object.

    Raises:
        StateError: there is no such adapter; a `disabled` or a `rows` block of the model is open.
        ConfigError: the scale is no finite number.
    """
    root = unwrap(model)
    state = own_state(root, "switch")
    refuse_blocks([state], "switch")  # parts of a model have no state of their own where the model has
    pool = pool_of(root, state)
    one_held(pool, adapter_name)
    if (factor := finite_number(scale)) is None:
        raise ConfigError(f"scale={scale!r} is no finite number of Python")
    with pool.lock:
        if (adapter_name, factor) != (pool.active, pool.scale):
            refuse_used(pool, None, f"make {adapter_name!r} the active adapter")
            vectors, trained = live_vectors(root, pool), live_saved(root, state)
            store_active(state, pool, vectors, trained)
            write_active(state, pool, vectors, trained, adapter_name, factor)
    return model


def delete_adapter(model: Model, adapter_name: str) -> Model:
    """Forget an adapter that waits; the vectors of the model stay, also those that no other adapter has.

    Returns:
        The same object.

    Raises:
        StateError: there is no such adapter, it is the active one, or an open `rows` block uses it.
    """
    root = unwrap(model)
    pool = pool_of(root, state_of(root, "delete an adapter"))
    one_held(pool, adapter_name)
    with pool.lock:
        if adapter_name == pool.active:
            others = [name for name in pool.held if name != adapter_name]
            what = f"make another one active first ({shortened(others)})" if others else "call onelora.detach(model)"
            raise StateError(f"can't delete {adapter_name!r}: it is the active adapter; {what}")
        refuse_used(pool, adapter_name, f"delete {adapter_name!r}")
        pool.drop(adapter_name)
    return model
