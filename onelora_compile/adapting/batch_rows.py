"""The vectors of a `rows` block: one for each row of the batch, out of a table with a row for each adapter.

What the forward of an adapted linear needs is here; `rows_block.py` opens and closes blocks.

A block holds for its thread.  Dynamo follows `threading.local` itself, whose attributes it guards for the thread that
calls; of a subclass of it, it takes the defaults of the class (torch 2.13), which are those of no block.  So the
attributes are missing where no block is open.

A checkpoint runs a forward again in the backward, and what is open then may be another block, or none.  Autograd
numbers the nodes that a thread makes, so the number of the node that asks for it tells when that forward was.
Private API, as in torch/autograd/graph.py and torch/fx/traceback.py of torch 2.13: the number, and the node that runs.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import deque
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.dynamo.private_api import captures
from onelora_compile.errors import StateError

ROWS = "_onelora_rows"  # the attribute of an adapted linear whose model has a table
_lock = threading.Lock()
_count = 0
# Whether any thread has a block open: all that a compiled model without one asks, as one guard for all its linears.
_open = False
_mixed = False  # whether there ever was a block with gradients


Chosen = tuple[Tensor, Tensor]  # rows of the table int64 [batch], and where it is the active adapter bool [batch, 1]
_REMEMBERED = 1000  # blocks between a forward and its backward


@dataclasses.dataclass
class Recorded:
    """Which nodes of autograd were made while rows were chosen: from one number on, up to another one.

    Of a block that was opened inside no_grad, another thread is not asked whether its nodes are meant.
    """

    thread: int
    rows: weakref.ref[Tensor]
    gradients: bool
    first: int
    end: float = inf


class Block:
    """The blocks of one model: which thread has chosen which rows.

    Attributes:
        here: of the thread: `rows` and `active`, what it has chosen.
        off: whether the model is in a `disabled` block.
        open: rows and active of every thread's innermost block.
        mixed: whether there was a block with gradients.
        recording: what autograd records in the open blocks, by thread.
        recorded: what it recorded in closed ones.
        sequence_first: the name of a module that says of itself that the batch is its second axis; "" if none does.
    """

    def __init__(self) -> None:
        self.here = threading.local()
        self.off = False
        self.open: dict[int, Chosen] = {}
        self.mixed = False
        self.recording: dict[int, Recorded] = {}
        self.recorded: deque[Recorded] = deque(maxlen=_REMEMBERED)
        self.sequence_first = ""

    def __reduce__(self) -> Any:
        return Block, ()  # a copy of the model is in no block

    def choose(self, chosen: Chosen | None) -> Chosen | None:
        """Set what this thread has chosen, None for nothing; returns what it had."""
        global _count, _mixed
        mine = threading.get_ident()
        with _lock:
            before = self.open.pop(mine, None)
            self._end(mine)
            if chosen is not None:
                self.open[mine] = chosen
                self.mixed |= torch.is_grad_enabled()
                self.recording[mine] = Recorded(mine, weakref.ref(chosen[0]), torch.is_grad_enabled(), next_node())
            _count += (chosen is not None) - (before is not None)
            _mixed = _mixed or self.mixed
        _follow_count()
        if chosen is not None:
            self.here.rows, self.here.active = chosen
        elif before is not None:
            del self.here.rows, self.here.active
        return before

    def _end(self, thread: int) -> None:
        """What the thread records from here on belongs to no block, or to another one."""
        one = self.recording.pop(thread, None)
        if one is not None and one.first < next_node():
            one.end = next_node()
            self.recorded.append(one)

    def recomputed(self) -> Chosen | None:
        """What a forward has chosen that a checkpoint runs again, in the backward, which on a GPU is another thread.

        Raises:
            StateError: the block of that forward is closed, or it is one of several.
        """
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return None
        with _lock:
            number = node._sequence_nr()
            known = [*self.recorded, *self.recording.values()]
            found = [one for one in known if one.first <= number < one.end]
            own = [one for one in found if one.thread == threading.get_ident()]
            found = own or [one for one in found if one.gradients]
            rows = [one.rows() for one in found]
            chosen = [one for one in self.open.values() if any(one[0] is other for other in rows)]
        if not found:
            return None
        if (own or is_of_autograd()) and len(chosen) == 1 and all(one is chosen[0][0] for one in rows):
            return chosen[0]
        raise StateError(
            "a checkpointed forward of a onelora.rows block runs again in the backward, and "
            f"{'which block it is of can not be told' if chosen else 'its block is closed'}: call backward inside the "
            "block of its forward, and in one thread at a time; open blocks that need no gradient inside no_grad"
        )


def _follow_count() -> None:
    """Let `_open` change while no thread captures: a block that opens waits, one that closes leaves it as it is.

    That it stays True costs others a few guards.
    """
    global _open
    if bool(_count) == _open or not (lock := captures()).acquire(blocking=_count > 0):
        return
    try:
        with _lock:
            _open = _count > 0
    finally:
        lock.release()


def is_of_autograd() -> bool:
    """Whether this thread is one in which autograd runs the backward of a GPU, and not one of Python's own."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def next_node() -> int:
    """The number of the next node that autograd makes in this thread."""
    return torch._C._autograd._get_sequence_nr()


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
    if not compiling and own.block.mixed and torch._C._current_graph_task_id() != -1:
        return own.block.recomputed()
    rows = getattr(own.block.here, "rows", None)
    return None if rows is None else (rows, own.block.here.active)


def vector_of_rows(module: nn.Module, vector: Tensor, y: Tensor, chosen: Chosen) -> Tensor:
    """The vector of each row of the batch.

    Shapes: vector [out_features], y [batch, *, out_features] -> [batch, 1, …, out_features].

    Raises:
        StateError: y does not have the batch as its first axis, or it can't be told; the model is exported, traced or
            run by vmap.
    """
    rows, active = chosen
    own = getattr(module, ROWS)
    # The flag itself: Dynamo of PyTorch 2.11 takes every compilation for an export where is_exporting() is asked.
    if torch.compiler._is_exporting_flag or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
        raise StateError("can't export or trace inside a onelora.rows block: its rows would be constants")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(y):
        raise StateError(
            "onelora.rows can't choose adapters inside torch.func.vmap, which hides an axis of the batch: call the "
            "model with the whole batch"
        )
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
