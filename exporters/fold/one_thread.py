"""Let PyTorch work on one thread for a while, in whatever number of Python threads at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside, _before = 0, 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread until the last block is left: its number of threads is the process's, not a thread's.

    Folding is bound by memory and disk: on two busy cores, two threads took six times the processor time of one.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.get_num_threads()
        torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(1 if _inside else _before)
