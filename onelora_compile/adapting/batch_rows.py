"""The vectors of a `rows` block: one for each row of the batch, out of a table with a row for each adapter.

What the forward of an adapted linear needs is here; `rows_block.py` opens and closes blocks.

A block holds for its thread.  Dynamo follows `threading.local` itself, whose attributes it guards for the thread that
calls; of a subclass of it, it takes the defaults of the class (torch 2.13), which are those of no block.  So the
attributes are missing where no block is open.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.errors import StateError

ROWS = "_onelora_rows"  # the attribute of an adapted linear whose model has a table
_lock = threading.Lock()
_count = 0
# Whether any thread has a block open: all that a compiled model without one asks, as one guard for all its linears.
_open = False
_mixed = False  # whether there ever was a block with gradients


Chosen = tuple[Tensor, Tensor]  # rows of the table int64 [batch], and where it is the active adapter bool [batch, 1]


class Block:
    """The blocks of one model: which thread has chosen which rows.

    Attributes:
        here: of the thread: `rows` and `active`, what it has chosen.
        off: whether the model is in a `disabled` block.
        open: rows and active of every thread's innermost block.
        mixed: whether there was a block with gradients.
        sequence_first: the name of a module that says of itself that the batch is its second axis; "" if none does.
    """

    def __init__(self) -> None:
        self.here = threading.local()
        self.off = False
        self.open: dict[int, Chosen] = {}
        self.mixed = False
        self.sequence_first = ""

    def __reduce__(self) -> Any:
        return Block, ()  # a copy of the model is in no block

    def choose(self, chosen: Chosen | None) -> Chosen | None:
        """Set what this thread has chosen, None for nothing; returns what it had."""
        global _count, _open, _mixed
        mine = threading.get_ident()
        with _lock:
            before = self.open.pop(mine, None)
            if chosen is not None:
                self.open[mine] = chosen
                self.mixed |= torch.is_grad_enabled()
            _count += (chosen is not None) - (before is not None)
            _open, _mixed = _count > 0, _mixed or self.mixed
        if chosen is not None:
            self.here.rows, self.here.active = chosen
        elif before is not None:
            del self.here.rows, self.here.active
        return before

    def recomputed(self) -> Chosen | None:
        """What a forward has chosen that a checkpoint runs again, in the backward, which on a GPU is another thread.

        Raises:
            StateError: the block of that forward is closed, or it is one of several.
        """
        if torch._C._current_graph_task_id() == -1:
            return None
        if len(self.open) == 1:
            return next(iter(self.open.values()))
        raise StateError(
            f"a checkpointed forward runs again in the backward, and {len(self.open)} onelora.rows blocks of the model "
            "are open: call backward inside the block of its forward, and in one thread at a time"
        )


@dataclasses.dataclass
class LayerRows:
    """What a linear chooses from: its table [adapters + 1, out_features], row 0 zero, and the blocks of its model."""

    table: Tensor
    block: Block


def chosen_rows(module: nn.Module) -> Chosen | None:
    """The rows that this thread has chosen for the module's model, and which of them are the active adapter's."""
    compiling = torch.compiler.is_compiling()
    if not _open and (compiling or not _mixed):
        return None
    own = getattr(module, ROWS, None)
    if own is None or own.block.off:
        return None
    rows = getattr(own.block.here, "rows", None)
    if rows is not None:
        return rows, own.block.here.active
    return own.block.recomputed() if not compiling and own.block.mixed else None


def vector_of_rows(module: nn.Module, vector: Tensor, y: Tensor, chosen: Chosen) -> Tensor:
    """The vector of each row of the batch.

    Shapes: vector [out_features], y [batch, *, out_features] -> [batch, 1, …, out_features].

    Raises:
        StateError: y does not have the batch as its first axis, or it can't be told; the model is exported or traced.
    """
    rows, active = chosen
    own = getattr(module, ROWS)
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
        raise StateError("can't export or trace inside a onelora.rows block: its rows would be constants")
    if y.ndim < 2 or y.shape[0] != rows.shape[0]:
        raise StateError(
            f"onelora.rows chose adapters for {rows.shape[0]} rows, and the linear of a vector {list(vector.shape)} "
            f"has the output {list(y.shape)}: its first axis has to be the batch. Give one id for each row; leave out "
            "what sees the batch in another way (exclude_modules)"
        )
    if own.block.sequence_first and y.ndim > 2 and y.shape[1] == rows.shape[0]:
        raise StateError(
            f"which axis of {list(y.shape)} is the batch can't be told: {own.block.sequence_first!r} has batch_first="
            "False. Take another batch size than the length of the sequence, or run the adapters one after another "
            "(onelora.set_adapter)"
        )
    values = torch.where(active, vector, own.table.index_select(0, rows))
    return values.view(values.shape[0], *[1] * (y.ndim - 2), values.shape[1])
