"""Writing files so that a killed process leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new file name beside `path`; what is written there becomes `path` when the block ends well.

    If the block raises, nothing is left and an old file at `path` is untouched.

    Raises:
        OSError: the folder does not exist or can't be written.
    """
    path = Path(os.fspath(path))
    check_writable(path)
    target = path.resolve()  # a link stays a link: what it points to is replaced
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        mode = target.stat().st_mode & 0o7777 if target.exists() else _default_mode(beside)
        yield beside
        flush(beside)
        # Whatever wrote the file chose its mode (safetensors: 0600); the user's choice counts.
        os.chmod(beside, mode)
        os.replace(beside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def check_writable(path: Path) -> None:
    """Whether a file can be put at a path.

    Raises:
        OSError: it is a folder, or its folder does not exist or can't be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} can't be written")


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` when the block ends well.

    If the block raises, nothing is left and an old folder is untouched. An old folder is moved away and then removed:
    who is killed between the two renames finds it beside, as `.<name>.….old`.

    Raises:
        OSError: the folder that holds it does not exist or can't be written.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                flush(file)
        if path.exists():
            old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
            os.replace(path, old)
            os.replace(beside, path)
            shutil.rmtree(old)
        else:
            os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _default_mode(path: Path) -> int:
    """The mode that a new file gets here, by the process's umask."""
    path.touch()
    mode = path.stat().st_mode & 0o7777
    path.unlink()
    return mode


def flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk: a rename must not overtake them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
