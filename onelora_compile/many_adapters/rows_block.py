"""`rows`: a block in which each row of the batch is computed with an adapter of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import OneLoRALayer
from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import AdapterState, own_state
from onelora_compile.adapting.batch_rows import Chosen
from onelora_compile.adapting.pool import Pool
from onelora_compile.adapting.trained_besides import saved_tensors
from onelora_compile.errors import ConfigError, StateError
from onelora_compile.many_adapters.row_training import follow_tables, refuse_reduced
from onelora_compile.many_adapters.values import live_vectors, pool_of
from onelora_compile.printable import shortened

BASE = -1


@contextlib.contextmanager
def rows(model: nn.Module, ids: Sequence[int | str | None] | NDArray[Any] | Tensor) -> Iterator[None]:
    """Inside the block each row of the batch has its own adapter; one graph for any mix, no recompilation.

    The block holds for the thread that opens it, and ends in it, without an `await` inside. Gradients flow to the
    active adapter through the model's vectors, and to the others through `row_parameters`.

    Args:
        model: an adapted model, plain or compiled. The first axis of what its linears return has to be the batch.
        ids: [batch], an adapter for each row: names, or numbers as `adapters(model)` has them; None or -1 for the base.

    Raises:
        StateError: the model is not adapted, or disabled; rows are trained, and it is in DistributedDataParallel;
            there is no such adapter; adapters of the block differ in what has no row: heads, norms, and weights that
            are read and not called (experts, packed attention, convolutions). The message names it. In the forward:
            the batch has another size. At the end: the block was held over an `await`, or ends in another thread.
        ConfigError: the ids are no list of names and numbers, and no tensor of integers with one axis.
    """
    if isinstance(model, nn.DataParallel):
        raise StateError("rows can't be chosen in nn.DataParallel, which gives parts of a batch to other threads")
    root = unwrap(model)
    state = own_state(root, "choose rows")
    if state.pool.trained and torch.is_grad_enabled():
        refuse_reduced(model)
    if state.disabled:
        raise StateError("can't choose rows inside a onelora.disabled block: all of them are the base's there")
    pool = pool_of(root, state)
    with pool.lock:
        names = [_name(pool, one) for one in _listed(ids)]
        vectors = live_vectors(root, pool)
        _refuse_wholes(root, state, pool, vectors, set(names))
        chosen = _prepared(pool, vectors, names)
        pool.used.update({*names, None})
    holding = _Holding()
    before = pool.block.choose(chosen)
    try:
        yield
        holding.check()
    finally:
        if holding.here():
            pool.block.choose(None if holding.awaited() else before)  # what was before may be another task's
        with pool.lock:
            pool.used.subtract({*names, None})


class _Holding:
    """How a block is held: in one thread, and without an await, where other tasks of the thread would have its rows."""

    def __init__(self) -> None:
        self._thread, self._others = threading.get_ident(), list[bool]()
        with contextlib.suppress(RuntimeError):  # no event loop runs here
            # Runs when the loop gets its turn, which is at the next await.
            asyncio.get_running_loop().call_soon(self._others.append, True)

    def awaited(self) -> bool:
        return bool(self._others)

    def here(self) -> bool:
        return threading.get_ident() == self._thread

    def check(self) -> None:
        if self.awaited():
            raise StateError(
                "a onelora.rows block was held over an await: other tasks of the thread had its rows meanwhile, and a "
                "model that an executor runs, in another thread, had none. Open the block around the call of the model "
                "alone, in the function that an executor runs"
            )
        if not self.here():
            raise StateError(
                "a onelora.rows block ends in another thread than it began in, and that one still has its rows: open "
                "it around the call of the model alone"
            )


def _listed(ids: Sequence[int | str | None] | NDArray[Any] | Tensor) -> list[int | str | None]:
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ConfigError(f"ids is {list(ids.shape)} in {ids.dtype}: one integer for each row of the batch, please")
        return list(ids.tolist())
    if isinstance(ids, np.ndarray) and ids.ndim == 1:
        return list(ids.tolist())
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise ConfigError(f"ids={ids!r}: a list with the adapter of each row of the batch, or a tensor of integers")
    return list(ids)


def _name(pool: Pool, one: object) -> str | None:
    """The name that is meant by an id; None for the base."""
    if one is None:
        return None
    if isinstance(one, str):
        if one in pool.held:
            return one
    elif isinstance(one, bool) or not isinstance(one, Integral):
        raise ConfigError(f"ids holds {one!r}: a name, a whole number, or None for the base")
    elif one == BASE:
        return None
    elif found := [name for name, held in pool.held.items() if held.id == one]:
        return found[0]
    known = shortened([f"{name!r} ({held.id})" for name, held in pool.held.items()])
    raise StateError(f"there is no adapter {one!r} on this model; it has {known}, and the base is -1 or None")


def _prepared(pool: Pool, vectors: Mapping[str, Tensor], names: list[str | None]) -> Chosen:
    """Which row of the table each row of the batch takes, and where it is the active adapter."""
    devices = {vector.device for vector in vectors.values()}
    if len(devices) > 1:
        raise StateError(
            f"rows can't be chosen in a model whose vectors are on several devices ({shortened(map(str, devices))})"
        )
    (device,) = devices
    pool.reserve(vectors, device)
    pool.give_to(pool.places)
    if pool.trained:
        follow_tables(pool)
    numbers = [0 if name is None else pool.held[name].row for name in names]
    active = [name == pool.active for name in names]
    with torch.inference_mode(False):
        chosen = torch.tensor(numbers, dtype=torch.int64, device=device)
        return chosen, torch.tensor(active, dtype=torch.bool, device=device).unsqueeze(-1)


def _refuse_wholes(
    root: nn.Module, state: AdapterState, pool: Pool, vectors: Mapping[str, Tensor], used: set[str | None]
) -> None:
    """What has one value for the whole batch has to be the same for all adapters of the block."""
    if used == {pool.active}:
        return
    read = [name for name, (module, _) in pool.places.items() if not isinstance(module, OneLoRALayer)]
    waiting = [name for name in used if name not in (None, pool.active)]
    found = [name for name in read if vectors[name].any()]
    for one in waiting:
        own = dict(zip(vectors, pool.row_of(one, vectors), strict=True)) if read else {}
        found += [name for name in read if name not in found and own[name].any()]
    if found:
        raise StateError(
            f"{shortened(found)}: a weight that is read, and not called, has no row for each adapter, and the adapters "
            "of this block differ in it: train them with exclude_modules, or run them one after another "
            "(onelora.set_adapter)"
        )
    live = saved_tensors(root, state) if state.originals else {}
    for name, original in state.originals.items():
        values = [live[name], *(pool.held[one].saved.get(name, original) for one in waiting)]
        if not all(torch.equal(value, original.to(value)) for value in values):
            raise StateError(
                f"{name!r} was trained as a whole (modules_to_save, train_norms, batch-norm statistics), so it has no "
                "row for each adapter, and the adapters of this block differ in it: run them one after another "
                "(onelora.set_adapter)"
            )
