"""What code does outside of the process is not done while it is looked at: files, processes, connections.

A file that is opened for writing is one in memory, and what removes, renames or makes files does nothing, so that the
code goes on as it would.  What starts a process or a connection raises: what it would give back can't be made up.
Other threads meet none of it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from onelora_compile.looking.one_at_a_time import LOOKING, seen_here

_MOST = 100  # then the code waits for what it does: `while os.path.exists(path): os.remove(path)`
_DROPPED: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *("remove", "unlink", "rename", "renames", "replace", "mkdir", "makedirs", "rmdir", "removedirs", "symlink"),
        *("link", "truncate", "ftruncate", "chmod", "fchmod", "lchmod", "chown", "fchown", "lchown", "utime", "mkfifo"),
        *("mknod", "umask", "write", "kill", "killpg", "setxattr", "removexattr"),
    ),
    signal: ("signal", "alarm", "setitimer", "raise_signal"),
    torch: ("save",),
}
_REFUSED: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile", "_exit", "abort"),
        *(f"{kind}{how}" for kind in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    ),
    subprocess: ("Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"),
    socket: ("socket", "create_connection", "create_server", "socketpair"),
}


class _Looking:
    """Which thread looks, and how often its code did something outside."""

    def __init__(self) -> None:
        self.thread = 0
        self.done = 0
        self.open = builtins.open  # or what a test or a tool has put in its place

    def here(self) -> bool:
        """Whether this thread looks; what of it stands somewhere longer than the block does as what it stands for."""
        return threading.get_ident() == self.thread

    def drop(self) -> None:
        """Count one more.

        Raises:
            RuntimeError: once too often.
        """
        self.done += 1
        if self.done > _MOST:
            raise RuntimeError("a loop that waits for what it does to files")


_looking = _Looking()


@contextlib.contextmanager
def kept_outside() -> Iterator[None]:
    """Inside the block this thread's code changes no file, and starts no process and no connection."""
    with LOOKING, contextlib.ExitStack() as stack:
        if _looking.here():  # inside another block
            yield
            return
        stack.callback(_put_back, builtins.open)
        for module, instead in _instead().items():
            stack.enter_context(seen_here(module, instead))
        _looking.thread, _looking.done, _looking.open = threading.get_ident(), 0, builtins.open
        builtins.open = _in_memory  # found by no attribute of the module: of all threads
        yield


def _put_back(opened: Any) -> None:
    builtins.open = opened
    _looking.thread = 0


@functools.cache
def _instead() -> dict[ModuleType, dict[str, Any]]:
    """What stands for functions of modules."""
    instead: dict[ModuleType, dict[str, Any]] = {io: {"open": _in_memory}}
    for stand_in, table in ((_dropped, _DROPPED), (_refused, _REFUSED)):
        for module, names in table.items():
            here = {name: stand_in(module, name) for name in names if hasattr(module, name)}
            instead[module] = instead.get(module, {}) | here
    instead[os]["open"] = functools.partial(_file_descriptor, os.open)
    return instead


def _in_memory(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
    """Stands for `open`: what a thread that looks writes goes to memory."""
    if not _looking.here() or not isinstance(mode, str) or not set(mode) & set("wax+"):
        return _looking.open(file, mode, *args, **kwargs)
    _looking.drop()
    return io.BytesIO() if "b" in mode else io.TextIOWrapper(io.BytesIO(), "utf-8")


def _file_descriptor(own: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
    """Stands for `os.open`."""
    if _looking.here() and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        raise RuntimeError("os.open for writing is not run while code is looked at")
    return own(path, flags, *args, **kwargs)


def _dropped(module: ModuleType, name: str) -> Callable[..., Any]:
    own = getattr(module, name)

    def drop(*args: Any, **kwargs: Any) -> Any:
        return _looking.drop() if _looking.here() else own(*args, **kwargs)

    return drop


def _refused(module: ModuleType, name: str) -> Callable[..., Any]:
    own = getattr(module, name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if _looking.here():
            raise RuntimeError(f"{module.__name__}.{name} is not run while code is looked at")
        return own(*args, **kwargs)

    return refuse
