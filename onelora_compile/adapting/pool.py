"""The adapters of one model, by name: the active one in the model's own tensors, the others in a pool.

The pool is one tensor [adapters + 1, numbers]: a row for each adapter, its vectors one after another; row 0 is zero,
the base.  A switch copies the model's vectors into their row, and another row into the same vectors, so that nothing
that was compiled or recorded sees a difference.  What a linear chooses from in a `rows` block is a view of its columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import OneLoRALayer
from onelora_compile.adapting.batch_rows import ROWS, Block, LayerRows
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.recomputed import Changes
from onelora_compile.dynamo.private_api import any_number_of_rows, captures
from onelora_compile.errors import ConfigError

DEFAULT_ADAPTER = "default"  # PEFT's name of an adapter that was given none
_ALIGNED = 4  # columns of a vector start at multiples of 16 bytes, which Inductor's kernels load at once
Places = dict[str, tuple[nn.Module, str]]


@dataclasses.dataclass
class Held:
    """One adapter of a model.

    Attributes:
        id: its number in `rows`; never given to another one.
        config: with which it was made.
        vectors: the names of those that it was made with; all others of the model are zero for it.
        row: of the pool, where its vectors are while it waits.
        saved: heads, norms and statistics while it waits, by name; those that it does not name are the base's.
        parameter: its row, where rows are trained (row_training.py).
    """

    id: int
    config: OneLoRAConfig
    vectors: tuple[str, ...]
    row: int
    saved: dict[str, Tensor]
    parameter: nn.Parameter | None = None


@dataclasses.dataclass
class Pool:
    """The adapters of a model.

    Attributes:
        held: by name, the active one too.
        active: the name of the one whose values are the model's.
        scale: by which its vectors are multiplied in the model.
        values: [adapters + 1, numbers] in the dtype of the vectors; None before there is a second adapter.
        columns: where the vectors begin in a row, by name.
        block: the `rows` blocks of the model.
        changes: when the model got other values.
        used: how many open blocks use an adapter, by name; all of them under None.
        trained: whether rows are trained, see row_training.py.
        arriving: of the backward that runs, by its number: gradients of tables by the names of their vectors.
        places: the module and the attribute of every vector, by name, of the adapted modules `seen`.
        trained_places: those of what is trained besides, of the modules `walked`; empty before they are asked for.
    """

    held: dict[str, Held] = dataclasses.field(default_factory=dict)
    active: str = DEFAULT_ADAPTER
    scale: float = 1.0
    values: Tensor | None = None
    columns: dict[str, int] = dataclasses.field(default_factory=dict)
    block: Block = dataclasses.field(default_factory=Block)
    changes: Changes = dataclasses.field(default_factory=Changes)
    used: Counter[str | None] = dataclasses.field(default_factory=Counter)
    next_id: int = 0
    trained: bool = False
    arriving: tuple[int, list[tuple[str, Tensor]]] | None = None
    places: Places = dataclasses.field(default_factory=dict)
    seen: list[nn.Module] = dataclasses.field(default_factory=list)
    trained_places: Places = dataclasses.field(default_factory=dict)
    walked: list[nn.Module] = dataclasses.field(default_factory=list)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, object]:
        """A copy of the model is in no block."""
        own = {key: value for key, value in self.__dict__.items() if key not in ("lock", "used")}
        held = {name: dataclasses.replace(one, parameter=None) for name, one in self.held.items()}
        return own | {"held": held, "trained": False, "arriving": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, lock=threading.RLock(), used=Counter())

    def put(self, name: str, config: OneLoRAConfig, vectors: tuple[str, ...], saved: dict[str, Tensor]) -> Held:
        """Make room for an adapter, or for other values of one."""
        known = self.held.get(name)
        if known is None:
            taken = {held.row for held in self.held.values()}
            row = next(row for row in range(1, len(taken) + 2) if row not in taken)
            known = self.held[name] = Held(self.next_id, config, vectors, row, saved)
            self.next_id += 1
        known.config, known.vectors, known.saved = config, vectors, saved
        return known

    def drop(self, name: str) -> None:
        """Forget an adapter; its row is free."""
        held = self.held.pop(name)
        if held.parameter is not None:  # an optimizer may have it still, and the row will be another adapter's
            held.parameter.data, held.parameter.grad = held.parameter.data.clone(), None
        if self.values is not None and held.row < len(self.values):
            with torch.no_grad():
                self.values[held.row].zero_()

    def reserve(self, vectors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        """Make the table wide and high enough, and put it on a device; values and gradients are kept."""
        first = next(iter(vectors.values()))
        columns, width = _columns(vectors)
        rows = max(held.row for held in self.held.values()) + 1
        old = self.values
        device = device or (first.device if old is None else old.device)
        wide = any(one.dtype == torch.float64 for one in [*vectors.values(), *([] if old is None else [old])])
        dtype = torch.float64 if wide else torch.float32
        enough = old is not None and columns == self.columns and rows <= len(old)
        if enough and old is not None and (device, dtype) == (old.device, old.dtype):
            return
        high = rows + 1 if old is None or rows <= len(old) else len(old) * 3 // 2 + 1
        shape, before, self.columns = (max(high, 0 if old is None else len(old)), width), self.columns, columns
        places = [(start, columns[name], vectors[name].numel()) for name, start in before.items()]
        with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode could never be trained
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            if old is not None:
                _move(old, self.values, places)
            for held in self.held.values():
                if held.parameter is not None:
                    _follow(held.parameter, self.values[held.row], places)

    def row_of(self, name: str, vectors: Mapping[str, Tensor]) -> list[Tensor]:
        """The vectors of a waiting adapter, views of its row, in the order of `vectors`."""
        assert self.values is not None
        sizes = [part for vector in vectors.values() for part in (vector.numel(), -vector.numel() % _ALIGNED)]
        parts = self.values[self.held[name].row].split(sizes)[::2]  # one call: hundreds of slices take longer
        return [
            part if vector.ndim == 1 else part.view(vector.shape)
            for part, vector in zip(parts, vectors.values(), strict=True)
        ]

    def give_to(self, places: Places) -> None:
        """Give every linear that is called its columns to choose from."""
        assert self.values is not None
        for name, (module, attribute) in places.items():
            if not isinstance(module, OneLoRALayer):
                continue
            vector = module._parameters[attribute]
            assert vector is not None
            start = self.columns[name]
            table = self.values[:, start : start + prod(vector.shape)].detach()
            known = getattr(module, ROWS, None)
            if known is None or known.table.data_ptr() != table.data_ptr() or known.table.shape != table.shape:
                with captures() if known is None else contextlib.nullcontext():
                    setattr(module, ROWS, LayerRows(any_number_of_rows(table), self.block))


def check_name(name: object) -> str:
    """Check the name of an adapter.

    Raises:
        ConfigError: it is no string, or empty.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"adapter_name={name!r}: the name of an adapter is a string, and not empty")
    return name


def _move(old: Tensor, new: Tensor, places: Sequence[tuple[int, int, int]]) -> None:
    """Copy columns of a table: where they were, where they are, and how many they are."""
    for before, after, size in places:
        new[: len(old), after : after + size] = old[:, before : before + size]


def _follow(parameter: nn.Parameter, row: Tensor, places: Sequence[tuple[int, int, int]]) -> None:
    """Let a parameter, which an optimizer has, be a row of the new table, with the gradient that it has."""
    gradient, parameter.grad, parameter.data = parameter.grad, None, row
    if gradient is not None:
        parameter.grad = torch.zeros_like(row)
        _move(gradient.unsqueeze(0), parameter.grad.unsqueeze(0), places)


def _columns(vectors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    columns, width = {}, 0
    for name, vector in vectors.items():
        columns[name] = width
        width += -(-vector.numel() // _ALIGNED) * _ALIGNED
    return columns, width
