"""What looking at a model changes in the whole process belongs to one thread at a time, and the others see none of it.

Classes of PyTorch, standard output, warnings and random states are the process's: two threads that change them and put
them back in turns would leave them changed.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

LOOKING = threading.RLock()  # whoever holds it may change what is the process's, and puts it back before it lets go


@contextlib.contextmanager
def silent(*streams: str) -> Iterator[None]:
    """Drop what this thread prints inside the block; what other threads print arrives.

    Args:
        streams: "stdout", "stderr".
    """
    with LOOKING:
        before = {name: getattr(sys, name) for name in streams}
        for name, stream in before.items():
            setattr(sys, name, _silent(stream))
        try:
            yield
        finally:
            for name, stream in before.items():
                setattr(sys, name, stream)


@contextlib.contextmanager
def seen_here(module: types.ModuleType, instead: Mapping[str, Any]) -> Iterator[None]:
    """Give names of a module other values inside the block, for what functions outside of the module's package ask.

    Other threads get the module's own, and so does what keeps it longer than the block: tables that the package makes
    of its functions, and the globals of modules that are imported meanwhile.

    Args:
        module: not changed but for its class.
        instead: what this thread gets, by name.
    """
    with LOOKING:
        kind, thread, held = type(module), threading.get_ident(), vars(module)

        def value(name: str) -> property:
            def get(_: Any) -> Any:
                asks = sys._getframe(1)
                package = str(asks.f_globals.get("__name__")).partition(".")[0]
                passing = package != module.__name__ and asks.f_code.co_name != "<module>"
                return instead[name] if passing and threading.get_ident() == thread else held[name]

            return property(get, lambda _, new: held.update({name: new}))

        module.__class__ = type(kind.__name__, (kind,), {name: value(name) for name in instead})
        try:
            yield
        finally:
            module.__class__ = kind


class _Silent:
    """A stream that one thread can't write to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._thread = 0

    def of(self, stream: Any) -> bool:
        """Whether it stands for that stream."""
        return self._stream is stream

    def for_this_thread(self) -> _Silent:
        """Drop what the thread that calls writes."""
        self._thread = threading.get_ident()
        return self

    def write(self, text: str) -> int:
        """Pass it on, unless the silent thread wrote it."""
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# They outlive their block: `print` of another thread may still write to one, and holds no reference to it (CPython
# before 3.14, Python/bltinmodule.c).
_STREAMS: collections.deque[_Silent] = collections.deque(maxlen=64)


def _silent(stream: Any) -> _Silent:
    """What stands for a stream, the same each time."""
    found = next((one for one in _STREAMS if one.of(stream)), None)
    if found is None:
        found = _Silent(stream)
        _STREAMS.append(found)
    return found.for_this_thread()
