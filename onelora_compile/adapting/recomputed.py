"""A checkpoint runs a forward again in the backward: refused where the model has other values by then.

These are the base's inside a `disabled` block, and another adapter's after a switch.  As in `batch_rows.py`, autograd's
number of the node that asks tells which values its forward had.  Numbers are counted in each thread, so a change tells
nothing about forwards of other threads: those compute with what there is.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from onelora_compile.adapting.batch_rows import is_of_autograd, next_node
from onelora_compile.errors import StateError

_REMEMBERED = 1000  # changes between a forward and its backward
_lock = threading.Lock()
_here = threading.local()
_changed = False  # whether there ever was a change: all that a forward asks before there is one
Values = tuple[bool, int]  # whether they are the base's, and how many switches there were


class _Thread:
    """Stands for a thread, whose number the next one may have."""


class Changes:
    """When a model got other values.

    Attributes:
        now: what it has.
        until: by thread: what it had, each with the number of the node that was the first without it.
    """

    def __init__(self) -> None:
        self.now: Values = (False, 0)
        self.until: weakref.WeakKeyDictionary[_Thread, deque[tuple[int, Values]]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return Changes, ()  # a copy of the model had no forward yet

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Let adapted modules of the model ask here."""
        _of.update(dict.fromkeys(modules, self))

    def disable(self, disabled: bool) -> None:
        """The model is its base from here on, or itself again."""
        self._become((disabled, self.now[1]))

    def switch(self) -> None:
        """The model has the values of another adapter from here on."""
        self._become((self.now[0], self.now[1] + 1))

    def _become(self, values: Values) -> None:
        global _changed
        if torch._C._current_graph_task_id() != -1:  # by what runs again itself, as in its forward
            return
        if not hasattr(_here, "thread"):
            _here.thread = _Thread()
        with _lock:
            known = self.until.setdefault(_here.thread, deque(maxlen=_REMEMBERED))
            number = next_node()
            if not known or known[-1][0] != number:  # else no node has the values that end here
                if known and known[-1][1] == self.now:
                    known.pop()
                known.append((number, self.now))
            self.now, _changed = values, True

    def refuse_others(self) -> None:
        """Check that the forward that runs again has the values that it had.

        Raises:
            StateError: it has others.
        """
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return
        with _lock:
            found = [self._of_node(known, node._sequence_nr()) for known in self._asked()]
            now = self.now
        if found and now not in found:
            raise StateError(f"a checkpointed forward runs again in the backward, and {_reason(found[0], now)}")

    def _asked(self) -> list[deque[tuple[int, Values]]]:
        """What is known of this thread; where it is one of autograd's, of all that may have called the forward."""
        own = self.until.get(getattr(_here, "thread", None))  # type: ignore[arg-type]
        if own is not None:
            return [own]
        return list(self.until.values()) if is_of_autograd() else []

    def _of_node(self, known: deque[tuple[int, Values]], number: int) -> Values:
        values = self.now
        for until, before in reversed(known):
            if number >= until:
                break
            values = before
        return values


# No attribute of the modules: it would be pickled.
_of: weakref.WeakKeyDictionary[nn.Module, Changes] = weakref.WeakKeyDictionary()


def refuse_other_values(module: nn.Module) -> None:
    """Check that an adapted module, if it runs again in a backward, has the values of its forward.

    Raises:
        StateError: it has others.
    """
    if torch.compiler.is_compiling() or not _changed or torch._C._current_graph_task_id() == -1:
        return
    changes = _of.get(module)
    if changes is not None:
        changes.refuse_others()


def _reason(then: Values, now: Values) -> str:
    if then[0] and not now[0]:
        return (
            "the onelora.disabled block of that forward is closed: call backward inside the block, and run what needs "
            "no gradient inside no_grad"
        )
    if now[0] and not then[0]:
        return "that forward was outside of the onelora.disabled block that is open now: call backward outside of it"
    return (
        "the model has the values of another adapter since that forward (set_adapter, load_adapter): call backward "
        "before the switch"
    )
