"""Files of packages in the user's cache, downloaded once by an ordinary client and checked."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from onelora_compile.errors import MissingExtraError, OneLoRAError


def cached(name: str, purpose: str, command: Callable[[Path], Sequence[str]]) -> Path:
    """The path of a file in the user's cache, downloaded where it is not there yet.

    Args:
        name: of the file.
        purpose: who needs what in it, for the message.
        command: what downloads it into a folder.

    Raises:
        MissingExtraError: it can't be downloaded; the message says why and where to put it.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "onelora-compile" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if why := _failure(command(path.parent), path):
            raise MissingExtraError(
                f"{purpose} in {name} and {why}. Download that file by another way and put it at {path}"
            )
    return path


def checked(path: Path, name: str, sha256: str) -> bytes:
    """The content of a file that may be no other than the one that is meant.

    Raises:
        OneLoRAError: it is another one.
        OSError: it can't be read.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OneLoRAError(f"{path} is not the {name} that this was made with: another SHA-256")
    return content


def _failure(command: Sequence[str], path: Path) -> str:
    """Run it; why there is no such file afterwards, "" where there is."""
    client = "pip" if "pip" in command else command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"{client}, which downloads it, is not installed"
    if done.returncode or not path.exists():
        last = (done.stderr.strip().splitlines() or ["no such file afterwards"])[-1]
        return f"{client} could not download it ({last})"
    return ""
