"""Failures of the operating system, on demand: the nth call that touches a folder raises, or no file may grow."""

import contextlib
import errno
import os
import resource
import sys
from dataclasses import dataclass

# What Python tells its audit hooks before it makes the call, from C code too.
_EVENTS = {"open", "os.chmod", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}
_current = None


@dataclass
class Fault:
    """What goes wrong while a block runs.

    Attributes:
        nth: the call that raises, of all that name the folder or something in it, and of fsync; None: none does.
        lasting: whether all calls after it raise too, as when the disk is gone: then nothing can be cleaned up.
        number: of the error.
        size: bytes that a file may have, native libraries' too; None: any number.
    """

    nth: int | None = None
    lasting: bool = False
    number: int = errno.ENOSPC
    size: int | None = None
    folder: str = ""
    calls: int = 0
    fired: str = ""

    @property
    def gone(self):
        """Whether the disk is gone, so that nothing could be cleaned up."""
        return self.lasting and bool(self.fired)

    @property
    def leaves(self):
        """Whether something may be left: what failed is a removal, a look into a folder before it, or every call."""
        return self.gone or self.fired in ("os.remove", "os.rmdir", "os.scandir", "os.listdir", "open a folder")

    @property
    def keeps(self):
        """Whether weights that were replaced may be kept: also where a file that might name them can't be read."""
        return self.leaves or self.fired == "open to read"

    def check(self, event, path, *how):
        if self.nth is None or not isinstance(path, str | bytes | os.PathLike):
            return
        text = os.path.abspath(os.fsdecode(path))
        if text != self.folder and not text.startswith(self.folder + os.sep):
            return
        if event == "open":
            event = "open a folder" if os.path.isdir(text) else "open to write" if _writes(*how) else "open to read"
        self.calls += 1
        if self.calls == self.nth + 1 or (self.lasting and self.fired):
            self.fired = self.fired or event
            raise OSError(self.number, os.strerror(self.number), text)


@contextlib.contextmanager
def failing(folder, fault):
    """Let calls in a folder fail while the block runs; one block at a time."""
    global _current
    _install()
    fault.folder = os.path.realpath(folder)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault.size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, old[1]))
    _current = fault
    try:
        yield fault
    finally:
        _current = None
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def content(folder):
    """Bytes of every file, None for a folder, the target of a link."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
        if path.name != "lock" and "__pycache__" not in path.parts  # empty, and always there
    }


def path_of(file):
    """The path of an open file or folder, or of its number."""
    return os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")


def _install():
    if getattr(os.fsync, "fails", False):
        return
    real = os.fsync

    def fsync(file):
        if _current is not None:  # there is no audit event of it
            _current.check("os.fsync", path_of(file))
        return real(file)

    vars(fsync)["fails"] = True
    os.fsync = fsync
    sys.addaudithook(_audit)  # for good: a hook can't be taken away


def _writes(mode, flags):
    """Whether an audit event of `open` is about writing; `os.open` gives no mode."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else not set(mode) <= set("rbt")


def _audit(event, arguments):
    if _current is not None and event in _EVENTS:
        _current.check(event, *(arguments if event == "open" else arguments[:1]))
