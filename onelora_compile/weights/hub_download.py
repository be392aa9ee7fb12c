"""Adapters on the Hugging Face Hub: what an id is, and its files, through huggingface_hub.

    onelora_compile.load_adapter(model, "owner/name")

An id is what has that form and is no file or folder here. The names of the files are fixed, and all are of one commit:
`onelora.safetensors`, else a folder of PEFT, else a LoRA of diffusers. Tokens, the cache and HF_HUB_OFFLINE are those
of huggingface_hub.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import ModuleType

from onelora_compile.errors import AdapterFileError, ConfigError, require
from onelora_compile.file_names import as_path
from onelora_compile.printable import shortened
from onelora_compile.version import __version__
from onelora_compile.weights.file_kinds import IN_FOLDERS, KINDS, OF_DIFFUSERS
from onelora_compile.weights.peft_config import CONFIG
from onelora_compile.weights.peft_folder import TENSORS

PathLike = str | os.PathLike[str]
Token = str | bool | None
HUB = "Hugging Face Hub"
LIBRARY = {"library_name": "onelora-compile", "library_version": __version__}
FILES = (IN_FOLDERS, CONFIG, TENSORS)
_READ = (*FILES, OF_DIFFUSERS)
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = {*KINDS, ".onnx_adapter", ".plan", ".trt", ".bin", ".pt", ".pth", ".json"}


def is_id(path: PathLike) -> bool:
    """Whether this has the form of an id: `owner/name`, which does not end like a file."""
    text = path if isinstance(path, str) else Path(path).as_posix()
    return _ID.fullmatch(text) is not None and PurePosixPath(text).suffix.lower() not in _FILES


def fetched(path: Path) -> Path:
    """Where an adapter is that a path or an id means; any other path as it is, whether it is there or not.

    Raises:
        as `local_adapter`.
    """
    return local_adapter(path) if path.is_dir() or is_id(path) else path


def hub_library(purpose: str) -> ModuleType:
    """The package huggingface_hub.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("huggingface_hub", "hf", purpose)


def local_adapter(
    path: PathLike, revision: str | None = None, subfolder: str | None = None, token: Token = None
) -> Path:
    """The adapter file, or the folder of PEFT, that a path or an id means; what is on the Hub is downloaded.

    Args:
        path: a file, a folder of PEFT, one that holds `onelora.safetensors`, or an id on the Hub.
        revision: of an id: a branch, a tag or a commit.
        subfolder: in which folder of that the adapter is.
        token: of an id, as huggingface_hub takes it.

    Raises:
        FileNotFoundError: it is not there, nor on the Hub, as far as that tells.
        AdapterFileError: the repository holds no adapter.
        ConfigError: a revision of what is no id; a subfolder that leads out of the folder.
    """
    inside = _inside(subfolder)
    place = as_path(path, "path")
    if os.path.lexists(place):
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for an id on the {HUB}, and {place} is here: leave it out")
        folder = place / inside
    elif is_id(path):
        folder = _downloaded(place.as_posix(), revision, inside, token)
    else:
        raise FileNotFoundError(f"there is no adapter file {place}")
    alone = [IN_FOLDERS] if (folder / CONFIG).is_file() else [IN_FOLDERS, OF_DIFFUSERS]
    return next((folder / one for one in alone if (folder / one).is_file()), folder)


def told(error: Exception) -> str:
    """What huggingface_hub says, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _inside(subfolder: str | None) -> PurePosixPath:
    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(f"subfolder={subfolder!r} leads out of the folder: give one in it")
    return inside


def _downloaded(name: str, revision: str | None, inside: PurePosixPath, token: Token) -> Path:
    wanted = [glob.escape(str(inside / file)) for file in _READ]
    try:
        hub = hub_library(f"look for {name} on the {HUB}")
        got = hub.snapshot_download(name, revision=revision, token=token, allow_patterns=wanted, **LIBRARY)
    except Exception as error:  # of the package, of httpx or requests, and of files: they share no other base
        raise FileNotFoundError(
            f"there is no file or folder {name}, and the {HUB} does not give a repository of that id"
            f"{f' and revision {revision!r}' if revision else ''}: {told(error)}"
        ) from error
    folder = Path(got, inside)
    there = [file for file in _READ if (folder / file).is_file()]
    if {IN_FOLDERS, OF_DIFFUSERS} & set(there) or {CONFIG, TENSORS} <= set(there):
        return folder
    where = f" in {inside}" if inside.parts else ""
    raise AdapterFileError(
        f"{name} on the {HUB} holds no adapter{where}: neither {IN_FOLDERS}, nor {CONFIG} with {TENSORS}, nor "
        f"{OF_DIFFUSERS} (pickles are not opened). It holds {shortened(_listed(hub, name, revision, token) or there)}"
    )


def _listed(hub: ModuleType, name: str, revision: str | None, token: Token) -> Iterable[str]:
    """The files of a repository; none where it can't be asked."""
    with contextlib.suppress(Exception):
        return list(hub.HfApi(token=token, **LIBRARY).list_repo_files(name, revision=revision))
    return []
