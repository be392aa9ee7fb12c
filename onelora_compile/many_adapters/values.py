"""What the adapters of a model hold: where the values of each are, and the copies of a switch."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import Adapted, vector_name
from onelora_compile.adapting.adapter_state import AdapterState, adapted_weights, refuse_offloaded_vector
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.module_names import named_modules
from onelora_compile.adapting.pool import Held, Places, Pool
from onelora_compile.adapting.stand_ins import meant
from onelora_compile.adapting.trained_besides import check_saved, places_of_saved
from onelora_compile.adapting.weight_target import vector_at
from onelora_compile.errors import StateError
from onelora_compile.printable import shortened


def pool_of(root: nn.Module, state: AdapterState) -> Pool:
    """The adapters of an adapted model, the first of which is what `adapt` or `load_adapter` made it with."""
    pool = state.pool
    with pool.lock:
        if not pool.held:
            pool.put(pool.active, state.config, tuple(adapted_weights(root)), dict(state.originals))
    return pool


def live_vectors(root: nn.Module, pool: Pool) -> dict[str, nn.Parameter]:
    """The vectors of the model, by name.

    Raises:
        StateError: accelerate has offloaded one; or layers were moved or taken out while others of the adapters wait.
    """
    look_again(root, pool)
    found = {}
    for name, (module, attribute) in pool.places.items():
        vector = vector_at(module, attribute)
        refuse_offloaded_vector(name, module, vector, "read or write the adapters of the model")
        found[name] = meant(vector)
    return found


def look_again(root: nn.Module, pool: Pool) -> None:
    """Find the places of the vectors where the layers are others than before.

    Raises:
        StateError: layers were moved or taken out while adapters wait, whose vectors are known by the layers' names.
    """
    modules = _modules(root)
    if not _same(modules, pool.walked):
        pool.walked, pool.trained_places = modules, {}
    adapted: list[nn.Module] = [module for module in modules if isinstance(module, Adapted)]
    if not _same(adapted, pool.seen):
        # Names are looked up once: of hundreds of modules they take longer than a switch.
        targets = adapted_weights(root)
        places = {key: (target.module, vector_name(target.parameter)) for key, target in targets.items()}
        _follow(pool, places)
        pool.places, pool.seen = places, adapted
        pool.changes.follow(adapted)
        other = (name for name, module in named_modules(root) if getattr(module, "batch_first", True) is False)
        pool.block.sequence_first = next(other, "")


def _follow(pool: Pool, places: Places) -> None:
    """Names are what adapters that wait know their layers by; one alone is known by the layers' own vectors."""
    moved = [key for key, place in pool.places.items() if places.get(key) != place]
    moved = moved or [key for key in pool.columns if key not in places]
    (one, *others) = pool.held.values()
    if moved and (others or pool.scale != 1 or one.parameter is not None):
        raise StateError(
            f"the model holds {shortened(list(pool.held))}, and {shortened(moved)} are not the layers that they have "
            "vectors for: layers were moved, replaced or taken out. Put them back; or do this with one adapter, at "
            "scale=1, and the others saved and deleted"
        )
    if moved:
        pool.values, pool.columns = None, {}
    if not others:
        one.vectors = tuple(key for key in one.vectors if key in places)


def _same(modules: list[nn.Module], others: list[nn.Module]) -> bool:
    return len(modules) == len(others) and all(map(operator.is_, modules, others))


def _modules(root: nn.Module) -> list[nn.Module]:
    """The modules, each once, in the order of a walk that is quicker than `modules()`."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(module._modules.values())
    return [*found]


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


def live_saved(root: nn.Module, state: AdapterState) -> dict[str, Tensor]:
    """What adapters of the model train besides their vectors, by name; to be asked for after `live_vectors`."""
    places = state.pool.trained_places
    if places.keys() != state.originals.keys():
        places = state.pool.trained_places = places_of_saved(root, state)
    found = {name: module._parameters.get(own, module._buffers.get(own)) for name, (module, own) in places.items()}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    check_saved(state, tensors)
    return tensors


def store_active(
    state: AdapterState, pool: Pool, vectors: dict[str, nn.Parameter], trained: Mapping[str, Tensor]
) -> None:
    """Copy what the model has, its vectors and its `live_saved`, to where its adapter waits."""
    held = pool.held[pool.active]
    pool.reserve(vectors)
    with torch.inference_mode(False), torch.no_grad():
        torch._foreach_copy_(pool.row_of(pool.active, vectors), own_values(pool, vectors))
        held.saved = {name: value.clone() for name, value in _own_saved(state, held, trained).items()}


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


def write_active(
    state: AdapterState,
    pool: Pool,
    vectors: dict[str, nn.Parameter],
    trained: Mapping[str, Tensor],
    name: str,
    scale: float,
) -> None:
    """Copy an adapter from where it waits into the model: its vectors and its `live_saved`."""
    held = pool.held[name]
    live: list[Tensor] = [*vectors.values()]
    with torch.inference_mode(False), torch.no_grad():
        values = pool.row_of(name, vectors)
        # Multiplied before it is rounded: `own_values` compares with that.
        torch._foreach_copy_(live, values if scale == 1 else torch._foreach_mul(values, scale))
        if trained:
            torch._foreach_copy_([*trained.values()], [held.saved.get(key, state.originals[key]) for key in trained])
    pool.active, pool.scale = name, scale
    pool.changes.switch()


def _own_saved(state: AdapterState, held: Held, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the active adapter: what it trains besides its vectors, and what of the model's is not the base's any more."""
    return {
        name: trained[name].detach()
        for name, original in state.originals.items()
        if name in held.saved or not torch.equal(trained[name], original.to(trained[name]))
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
    saved = _own_saved(state, held, live_saved(root, state)) if active else held.saved
    return AdapterValues(held.config, values, saved)
