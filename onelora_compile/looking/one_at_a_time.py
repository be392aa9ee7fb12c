"""What looking at a model changes in the whole process belongs to one thread at a time, and the others see none of it.

Classes of PyTorch, standard output, warnings and random states are the process's: two threads that change them and put
them back in turns would leave them changed.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
from collections.abc import Iterator
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
