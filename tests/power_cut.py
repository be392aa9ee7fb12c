"""What a disk may hold after a cut of power at any moment of a block.

A kill loses nothing that was written. A cut of power loses what was not flushed: the bytes of a file without fsync, and
names, each by itself, whose folder had none since. Names that a disk may have kept are tried all, none, one alone, and
all but one.
"""

import contextlib
import itertools
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import path_of

_current = None


@dataclass
class Disk:
    """What is done to a folder, in order.

    Attributes:
        folder: the folder.
        before: bytes of its files by path, None for a folder; all of it is on the disk.
        steps: (what, path, other): "make", "folder", "name", "link" and "forget" change names, "flush" keeps bytes,
            "cut" opens a file to be written anew, "sync" keeps the names of a folder.
        busy: whether the hook itself is looking.
    """

    folder: Path
    before: dict[str, bytes | None]
    steps: list[tuple[str, str, Any]] = field(default_factory=list)
    busy: bool = False

    def note(self, what, path, other=""):
        """Note a step if it is about the folder."""
        text, root = os.path.abspath(os.fsdecode(path)), os.path.abspath(self.folder)
        if text == root or text.startswith(root + os.sep):
            if isinstance(other, str) and other:
                other = os.path.relpath(other, root)
            self.steps.append((what, os.path.relpath(text, root), other))

    def states(self):
        """Every content that the disk may have: whether the block had ended, and the content."""
        seen = set()
        for done in range(len(self.steps) + 1):
            over = done == len(self.steps)
            for kept in self._kept(done):
                found = self._replayed(done, kept)
                key = over, tuple(sorted(found.items(), key=lambda one: one[0]))
                if key not in seen:
                    seen.add(key)
                    yield over, found

    def _kept(self, done):
        """Sets of the steps that changed names, as the disk may have kept them."""
        sure: set[int] = set()
        open_: list[int] = []
        for number, (what, path, _) in enumerate(self.steps[:done]):
            if what == "sync":
                there = {one for one in open_ if path in self._folders(one)}
                sure |= there
                open_ = [one for one in open_ if one not in there]
            elif what not in ("flush", "cut"):
                open_.append(number)
        alone = [{one} for one in open_]
        missing = [set(open_) - one for one in alone]
        return [sure | more for more in (set(), set(open_), *alone, *missing)]

    def _folders(self, number):
        _, path, other = self.steps[number]
        return {os.path.dirname(path) or "."} | ({os.path.dirname(other) or "."} if other else set())

    def _replayed(self, done, kept):
        flushed = dict(enumerate(self.before.values()))
        names = {path: number for number, path in enumerate(self.before)}
        own = itertools.count(len(flushed))
        true = dict(names)  # what a program saw, whatever the disk kept
        for number, (what, path, other) in enumerate(self.steps[:done]):
            if what in ("flush", "cut"):
                flushed[true[path]] = other or b""
            elif what in ("make", "folder"):
                true[path] = next(own)
                flushed[true[path]] = None if what == "folder" else b""
                _set(names, path, true[path], number in kept)
            elif what == "name":
                true[other] = true.pop(path)
                if number in kept:
                    names.pop(path, None)
                _set(names, other, true[other], number in kept)
            elif what == "link":
                true[other] = true[path]
                _set(names, other, true[other], number in kept)
            elif what == "forget":
                true.pop(path, None)
                if number in kept:
                    names.pop(path, None)
        found = {path: flushed[one] for path, one in names.items()}
        return {path: content for path, content in found.items() if _reached(path, found)}


def _set(names, path, one, kept):
    if kept:
        names[path] = one


def _reached(path, found):
    return all(str(one) == "." or (str(one) in found and found[str(one)] is None) for one in Path(path).parents)


def write(found, folder):
    """Make a folder of a content."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in sorted(found.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


@contextlib.contextmanager
def watched(folder):
    """Note what a block does to a folder, in this process and by Python's own functions."""
    global _current
    _install()
    held = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*"))}
    _current = Disk(Path(folder), {name: None if path.is_dir() else path.read_bytes() for name, path in held.items()})
    try:
        yield _current
    finally:
        _current = None


def _install():
    if getattr(os.fsync, "watched", False):
        return
    real = os.fsync

    def fsync(file):
        if _current is not None:  # there is no audit event of it
            path = path_of(file)
            if os.path.isdir(path):
                _current.note("sync", path)
            else:
                _current.note("flush", path, _content(path))
        return real(file)

    vars(fsync)["watched"] = True
    os.fsync = fsync
    sys.addaudithook(_audit)  # for good: a hook can't be taken away


def _content(path):
    assert _current is not None
    _current.busy = True
    try:
        return Path(path).read_bytes()
    finally:
        _current.busy = False


def _audit(event, arguments):
    if _current is None or _current.busy:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & os.O_CREAT) if mode is None else bool(set(mode) & set("wx"))
        if writes and isinstance(path, str | os.PathLike):
            _current.note("cut" if os.path.exists(path) else "make", path)
    elif event == "os.mkdir" and not os.path.exists(arguments[0]):
        _current.note("folder", arguments[0])
    elif event == "os.rename":
        _current.note("name", *arguments[:2])
    elif event == "os.link":
        _current.note("link", *arguments[:2])
    elif event in ("os.remove", "os.rmdir") and os.path.exists(arguments[0]):
        _current.note("forget", arguments[0])
