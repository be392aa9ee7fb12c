"""Writing files so that a killed process leaves the old one or the new one, never half of one, and no input is lost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from onelora_compile.errors import ConfigError
from onelora_compile.file_names import as_path

if sys.platform != "win32":
    import fcntl

PathLike = str | os.PathLike[str]
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
TEMPORARY = ".onelora-"  # short whatever the name of the file is: a name has at most 255 bytes


def refuse_overwriting(out: PathLike, inputs: Iterable[PathLike], what: str = "out") -> None:
    """Check that what a call writes is none of the files that it reads, under whatever name.

    Args:
        out: what is written.
        inputs: what is read; what is no file is skipped.
        what: how the call names `out`.

    Raises:
        ConfigError: it is one of them, or holds one as a folder, or is no name of a file.
    """
    as_path(out, what)
    for one in map(Path, inputs):
        if not one.exists():
            continue
        same = os.path.exists(out) and os.path.samefile(out, one)
        inside = os.path.isdir(out) and Path(os.path.realpath(out)) in Path(os.path.realpath(one)).parents
        if same or inside:
            found = f"is a folder that holds the input {one}" if inside else f"would overwrite the input {one}"
            raise ConfigError(f"{what}={str(out)!r} {found}: give another name")


@contextlib.contextmanager
def replacing(path: PathLike, follow: bool = True) -> Iterator[Path]:
    """Yield a new file name beside `path`; what is written there becomes `path` when the block ends well.

    If the block raises, nothing is left and an old file at `path` is untouched.

    Args:
        path: the file.
        follow: whether a link stays a link, and what it points to is replaced; else the link is replaced.

    Raises:
        OSError: the folder does not exist or can't be written, the disk is full; it names `path`.
    """
    with replacing_all([path], follow) as (beside,):
        yield beside


@contextlib.contextmanager
def replacing_all(paths: Sequence[PathLike], follow: bool = True) -> Iterator[list[Path]]:
    """As `replacing`, for files that belong together: all are replaced, or none."""
    names = [Path(os.fspath(path)) for path in paths]
    targets = [Path(os.path.realpath(path)) if follow else path for path in names]
    besides = [_beside(target) for target in targets]
    with contextlib.ExitStack() as stack:
        for path, beside in zip(names, besides, strict=True):
            check_writable(path)
            stack.enter_context(naming(path, beside))
        try:
            modes = [
                target.stat().st_mode & 0o7777 if target.exists() else _default_mode(beside)
                for target, beside in zip(targets, besides, strict=True)
            ]
            yield besides
            for beside, mode in zip(besides, modes, strict=True):
                flush(beside)
                # Whatever wrote the file chose its mode (safetensors: 0600); the user's choice counts.
                os.chmod(beside, mode)
            _replace_all(besides, targets)
        except BaseException:
            for beside in besides:
                remove_file(beside)
            raise


def _replace_all(besides: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give files their names; where one can't have it, those before get their old content back."""
    kept: list[tuple[Path, Path | None]] = []
    try:
        for beside, target in zip(besides, targets, strict=True):
            if target != targets[-1]:
                kept.append((target, _keep(target)))
            os.replace(beside, target)
    except OSError:
        for target, old in kept:
            if old is None:
                remove_file(target)
            else:
                with contextlib.suppress(OSError):  # the error that is on its way says why
                    os.replace(old, target)
                    remove_file(old)  # is still there if both are one file
        raise
    for _, old in kept:
        if old is not None:
            remove_file(old)


def _keep(path: Path) -> Path | None:
    """A second name for the file at a path, if there is one."""
    if not path.exists():
        return None
    other = _beside(path, "old")
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copy2(path, other)
    return other


_SAID = "can't write: "


@contextlib.contextmanager
def naming(path: Path, *temporary: Path) -> Iterator[None]:
    """Errors of the operating system about a temporary name, or about none, are errors about `path`."""
    try:
        yield
    except OSError as error:
        named = [str(one) for one in (error.filename, error.filename2) if one is not None]
        if (named or error.errno is None) and not any(one.startswith(str(own)) for one in named for own in temporary):
            raise
        reason = (error.strerror or "").removeprefix(_SAID)  # a file in a folder that is written says it first
        raise type(error)(error.errno, f"{_SAID}{reason}", str(path)) from error
    except Exception as error:
        # safetensors has an error of its own for a full disk.
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"can't write {path}: {error}") from error


def check_writable(path: Path) -> None:
    """Whether a file can be put at a path.

    Raises:
        OSError: it is a folder, a device or a pipe, or its folder does not exist or can't be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    # `/dev/stdout` may lead to an ordinary file; the link itself, which the whole machine has, would be replaced.
    folder = os.path.realpath(path.parent)
    opened = folder in ("/dev", "/dev/fd") or f"{folder}/".startswith("/proc/")
    linked = path.is_symlink() and os.readlink(path).startswith("/proc/")
    if opened or linked or (path.exists() and not path.is_file()):
        raise FileExistsError(f"{path} is a device, a pipe or a socket, which would be lost; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} can't be written")


@contextlib.contextmanager
def replacing_folder(path: PathLike) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` when the block ends well.

    If the block raises, nothing is left and an old folder is untouched. Where the system can't exchange two folders in
    one step, an old one is moved away first: who is killed meanwhile finds it beside, as `.onelora-….old`.

    Raises:
        OSError: the folder that holds it does not exist or can't be written; it names `path`.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    target = Path(os.path.realpath(path))
    beside, old = _beside(target), _beside(target, "old")
    with naming(path, beside, old):
        beside.mkdir()
        try:
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    flush(file)
            with alone(target.parent):
                stale = _swap(beside, target, old)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    shutil.rmtree(stale, ignore_errors=True)  # the new folder is there: no reason to fail


def _swap(new: Path, target: Path, old: Path) -> Path:
    """Put `new` where `target` is; gives where the old folder is then, if there was one."""
    if target.exists() and _exchange(new, target):
        return new
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system can't."""
    function = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = (_HERE, os.fsencode(one), _HERE, os.fsencode(other))
    return function is not None and function(*paths, _EXCHANGE) == 0


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold other processes and threads that use this function off the folder; they wait."""
    if sys.platform == "win32":  # writers of one name are not kept apart there
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which ends the lock too


def remove_file(path: Path) -> None:
    """Remove a file if it is there and can be removed; never an error that hides another one, or what was written."""
    with contextlib.suppress(OSError):
        path.unlink()


def _beside(path: Path, ending: str = "tmp") -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.{ending}")


def _default_mode(path: Path) -> int:
    """The mode that a new file gets here, by the process's umask; the file is there afterwards."""
    path.touch()
    return path.stat().st_mode & 0o7777


def flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk: a rename must not overtake them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
