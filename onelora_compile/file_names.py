"""What a call was given as the name of a file, checked before anything is read or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from onelora_compile.errors import ConfigError


def as_path(given: Any, what: str) -> Path:
    """The path that an argument is.

    Args:
        given: the argument.
        what: its name.

    Raises:
        ConfigError: it is no path, bytes, empty, holds a NUL, which systems take for the end of a name, or bytes that
            are no UTF-8, which the libraries that read models and adapters can't open.
    """
    if not isinstance(given, str | bytes | os.PathLike):
        raise ConfigError(f"{what} is {_kind(given)}, not the name of a file: give a str or a pathlib.Path")
    name = os.fspath(given)
    if isinstance(name, bytes):
        raise ConfigError(f"{what}={given!r} is in bytes: give a str or a pathlib.Path (os.fsdecode makes one)")
    if not name.strip():
        raise ConfigError(f"{what}={name!r} is no name of a file")
    if "\0" in name:
        raise ConfigError(f"{what}={name!r} holds a NUL character, which no name of a file may")
    if not _is_utf8(name):
        raise ConfigError(f"{what}={name!r} is not UTF-8, and ONNX and safetensors open no such file: rename it")
    return Path(name)


def as_file(given: Any, what: str) -> Path:
    """The path of a file to write that an argument is.

    Raises:
        ConfigError: as of `as_path`; or it ends in a separator, and so names a folder, which a `Path` would not say.
    """
    path = as_path(given, what)
    if (name := os.fspath(given)).endswith(tuple(filter(None, (os.sep, os.altsep)))):
        raise ConfigError(f"{what}={name!r} ends in {name[-1]!r}, as a folder's name does: give the name of a file")
    return path


def _is_utf8(name: str) -> bool:
    try:  # as the system has it: in an ASCII locale Python writes every other byte as a surrogate
        os.fsencode(name).decode()
    except UnicodeError:
        return False
    return True


def check_there(path: Path) -> None:
    """Check that a file to read is there, so that its error says so in the same words everywhere.

    Raises:
        FileNotFoundError: there is none.
        IsADirectoryError: it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file is meant")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")


def as_paths(given: Any, what: str) -> list[Path]:
    """The paths that an argument of several files is.

    Raises:
        ConfigError: it is one name, which would count as one file for each letter, a mapping, or holds what is no path.
    """
    if isinstance(given, str | bytes | os.PathLike):
        raise ConfigError(f"{what}={given!r} is one file where a list is meant: [{given!r}]")
    if not isinstance(given, list | tuple):
        raise ConfigError(f"{what} is {_kind(given)}: give a list of files")
    return [as_path(one, f"{what}[{place}]") for place, one in enumerate(given)]


def _kind(given: Any) -> str:
    name = type(given).__name__
    return "None" if given is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
