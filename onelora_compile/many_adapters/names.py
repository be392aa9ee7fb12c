"""Several adapters of one model, by name, of which one is active; the words are PEFT's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import Adapted, vector_name
from onelora_compile.adapting.adapter import (
    AdapterState,
    adapted_weights,
    refuse_blocks,
    refuse_sharded,
    running_statistics,
    saved_tensors,
    state_of,
    state_or_none,
    unwrap,
)
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.pool import Held, Pool, check_name
from onelora_compile.adapting.select_targets import Selection, named_modules, saved_parameters
from onelora_compile.adapting.stand_ins import meant
from onelora_compile.errors import ConfigError, StateError
from onelora_compile.many_adapters.extend import extend, refuse_replicated, select_on_base
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
    """The adapters of a model by name, in the order in which they came; empty for a model that is not adapted."""
    root = unwrap(model)
    state = state_or_none(root)
    if state is None:
        return {}
    pool, found = pool_of(root, state), {}
    with pool.lock:  # other threads may add some
        own = {name: target.vector for name, target in adapted_weights(root).items()}
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
        ConfigError: the name is no string, or empty.
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
                _write_active(root, state, pool, live, name, 1.0)


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
    # Parts of a model have no state of their own where the model has; to ask each module takes longer than a switch.
    state = state_of(root, "switch", allow_disabled=True)
    refuse_blocks([state], "switch")
    pool = pool_of(root, state)
    one_held(pool, adapter_name)
    scale = _number(scale)
    with pool.lock:
        if (adapter_name, scale) != (pool.active, pool.scale):
            refuse_used(pool, None, f"make {adapter_name!r} the active adapter")
            vectors = live_vectors(root, pool)
            _store_active(root, state, pool, vectors)
            _write_active(root, state, pool, vectors, adapter_name, scale)
    return model


def _number(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ConfigError(f"scale={scale!r} is no finite number of Python")
    return float(scale)


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


def pool_of(root: nn.Module, state: AdapterState) -> Pool:
    """The adapters of an adapted model, the first of which is what `adapt` or `load_adapter` made it with."""
    pool = state.pool
    with pool.lock:
        if not pool.held:
            pool.put(pool.active, state.config, tuple(adapted_weights(root)), dict(state.originals))
    return pool


def live_vectors(root: nn.Module, pool: Pool) -> dict[str, nn.Parameter]:
    """The vectors of the model, by name."""
    adapted = _adapted_modules(root)
    if len(adapted) != len(pool.seen) or any(a is not b for a, b in zip(adapted, pool.seen, strict=True)):
        # Names are looked up once: of hundreds of modules they take longer than a switch.
        targets = adapted_weights(root)
        pool.places = {key: (target.module, vector_name(target.parameter)) for key, target in targets.items()}
        pool.seen = adapted
        other = (name for name, module in named_modules(root) if getattr(module, "batch_first", True) is False)
        pool.block.sequence_first = next(other, "")
    found = {}
    for name, (module, attribute) in pool.places.items():
        vector = module._parameters[attribute]
        assert vector is not None
        found[name] = meant(vector)
    return found


def _adapted_modules(root: nn.Module) -> list[nn.Module]:
    """The adapted modules, each once, in the order of a walk that is quicker than `modules()`."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(module._modules.values())
    return [module for module in found if isinstance(module, Adapted)]


def one_held(pool: Pool, name: str) -> Held:
    """The adapter of that name.

    Raises:
        StateError: there is none.
    """
    if not isinstance(name, str) or name not in pool.held:
        raise StateError(f"there is no adapter {name!r} on this model; it has {shortened(list(pool.held))}")
    return pool.held[name]


def refuse_used(pool: Pool, name: str | None, purpose: str) -> None:
    """Check that no open `rows` block uses an adapter; any adapter for None.

    Raises:
        StateError: one does.
    """
    if pool.used[name]:
        raise StateError(f"can't {purpose} while a onelora.rows block of the model is open that uses it")


def _store_active(root: nn.Module, state: AdapterState, pool: Pool, vectors: dict[str, nn.Parameter]) -> None:
    """Copy what the model has to where its adapter waits."""
    held = pool.held[pool.active]
    pool.reserve(vectors)
    with torch.inference_mode(False), torch.no_grad():
        torch._foreach_copy_(pool.row_of(pool.active, vectors), own_values(pool, vectors))
        held.saved = {name: value.clone() for name, value in _live_saved(root, state, held).items()}


def own_values(pool: Pool, vectors: dict[str, nn.Parameter]) -> list[Tensor]:
    """The vectors of the active adapter as they are without its scale."""
    live = [vector.detach() for vector in vectors.values()]
    if pool.scale == 1:
        return live
    known = pool.row_of(pool.active, vectors)
    same = [torch.equal(one, (row * pool.scale).to(one)) for one, row in zip(live, known, strict=True)]
    if pool.scale == 0 and not all(same):
        raise StateError(
            f"the vectors of {pool.active!r} were changed while its scale was 0, and what that makes of them can't be "
            "told: set the scale to 1 before training"
        )
    return [row if kept else one / pool.scale for one, row, kept in zip(live, known, same, strict=True)]


def _write_active(
    root: nn.Module, state: AdapterState, pool: Pool, vectors: dict[str, nn.Parameter], name: str, scale: float
) -> None:
    """Copy an adapter from where it waits into the model."""
    held = pool.held[name]
    live: list[Tensor] = [*vectors.values()]
    with torch.inference_mode(False), torch.no_grad():
        values = pool.row_of(name, vectors)
        # Multiplied before it is rounded: `own_values` compares with that.
        torch._foreach_copy_(live, values if scale == 1 else torch._foreach_mul(values, scale))
        for key, tensor in (saved_tensors(root, state) if state.originals else {}).items():
            tensor.copy_(held.saved.get(key, state.originals[key]))
    pool.active, pool.scale = name, scale


def _live_saved(root: nn.Module, state: AdapterState, held: Held) -> dict[str, Tensor]:
    """Of the active adapter: what it trains besides its vectors, and what of the model's is not the base's any more."""
    if not state.originals:
        return {}
    live = saved_tensors(root, state)
    return {
        name: live[name].detach()
        for name, original in state.originals.items()
        if name in held.saved or not torch.equal(live[name], original.to(live[name]))
    }


@dataclasses.dataclass(frozen=True)
class AdapterValues:
    """The values of one adapter: views where it waits, or of the model where it is the active one."""

    config: OneLoRAConfig
    vectors: dict[str, Tensor]
    saved: dict[str, Tensor]


def values_of(root: nn.Module, state: AdapterState, name: str | None = None) -> AdapterValues:
    """The values of an adapter, without its scale; of the active one for None.

    Of several each has its own vectors alone, and those that are not zero.

    Raises:
        StateError: there is no such adapter.
    """
    pool = pool_of(root, state)
    name = pool.active if name is None else name
    held, vectors = one_held(pool, name), live_vectors(root, pool)
    active = name == pool.active
    values = dict(zip(vectors, own_values(pool, vectors) if active else pool.row_of(name, vectors), strict=True))
    if len(pool.held) > 1:
        values = {key: value for key, value in values.items() if key in held.vectors or bool(value.any())}
    return AdapterValues(held.config, values, _live_saved(root, state, held) if active else held.saved)
