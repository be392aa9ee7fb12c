"""What a file is, by its name and by how it begins: nothing that is written takes the place of another kind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from onelora_compile.errors import ConfigError
from onelora_compile.file_names import as_file, as_path

ADAPTER = ".safetensors"  # how the name of an adapter file ends
IN_FOLDERS = "onelora.safetensors"  # its name in a checkpoint, and in a repository of the Hugging Face Hub
OF_DIFFUSERS = "pytorch_lora_weights.safetensors"  # as diffusers calls a LoRA
GGUF_FILE = ".gguf"
FORMAT = "onelora"  # what its metadata says
# What the names of files tell.
KINDS = {
    ".onnx": "an ONNX model",
    ADAPTER: "an adapter",
    ".engine": "a TensorRT engine",
    ".data": "the weights of a model",
    ".vectors": "the vectors of a model",
    ".pt2": "a program of PyTorch",
    ".pte": "an ExecuTorch program",
    ".xml": "an OpenVINO model",
    GGUF_FILE: "a GGUF adapter",
}
_BEGINS: dict[str, Callable[[bytes], bool]] = {
    ".onnx": lambda start: start[:1] == b"\x08",  # the first field of a ModelProto
    ADAPTER: lambda start: _format(start) == FORMAT,
    ".engine": lambda start: start[1:4] == b"trt",
    ".xml": lambda start: b"<net " in start,
    GGUF_FILE: lambda start: start[:4] == b"GGUF" and b"general.type" in start and b"adapter" in start,
}

# What is often found under a name of safetensors.
_MISTAKEN = {
    b"PK\x03\x04": "a zip file, as torch.save writes: its pickle could run any code and is not opened",
    **{bytes([0x80, protocol]): "a pickle, which could run any code and is not opened" for protocol in range(2, 6)},
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of git LFS in the place of the file: git lfs pull gets it",
    b"<": "a page of HTML or XML: download the file itself",
}

_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package
_FEW = 256  # bytes, of any other file; the first two fields of a GGUF file are the architecture and the type


def refuse_other_kinds(out: str | os.PathLike[str], ending: str, what: str = "out") -> None:
    """Check that what is written takes the place of no file of another kind.

    A file is known by its name, and what is there already under a name that tells nothing by how it begins.

    Args:
        out: what is written.
        ending: of names of its kind, one of `KINDS`; another for a kind that is known by nothing else.
        what: how the call names `out`.

    Raises:
        ConfigError: it is named like another kind, or would replace a file of one, or is no name of a file.
    """
    path = as_file(out, what) if ending else as_path(out, what)
    named = path.suffix.lower()
    if named != ending and named in KINDS:
        raise ConfigError(f"{what}={str(out)!r}: a file that ends in {named} is {KINDS[named]}: give another name")
    if ending not in _BEGINS or not path.is_file() or not (start := _start(path)):
        return
    if named != ending:
        foreign = not _BEGINS[ending](start)
    elif (
        ending == ADAPTER
    ):  # a damaged file of the right name may be replaced, but the weights of a model are no adapter
        foreign = _format(start) not in (None, FORMAT)
    elif ending == GGUF_FILE:  # and neither are they in a GGUF file
        foreign = start[:4] == b"GGUF" and not _BEGINS[ending](start)
    else:
        foreign = ending == ".xml" and not _BEGINS[ending](start)
    if foreign:
        raise ConfigError(f"{what}={str(out)!r} is there and is not {KINDS[ending]}: remove it, or give another name")


def no_safetensors(path: Path, error: Exception) -> str:
    """What a file is that the reader of safetensors refused, by how it begins."""
    start = _start(path)
    if start[8:9] != b"{":  # else a damaged one: its header begins after 8 bytes
        for begin, kind in _MISTAKEN.items():
            if start.startswith(begin):
                return f"{path} is not a safetensors file but {kind}"
    return f"{path} is not a safetensors file, or is damaged: {error}"


def _start(path: Path) -> bytes:
    """The first bytes of a file; of safetensors, its header."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            return start + file.read(size if size < _LONGEST_HEADER else _FEW)
    except OSError:  # what can't be read is told of where it is written
        return b""


def _format(start: bytes) -> str | None:
    """What the metadata of a header of safetensors calls its format, "" without; None where it is no such header."""
    try:
        header = json.loads(start[8:])
        return str(header.get("__metadata__", {}).get("format", ""))
    except (ValueError, AttributeError, RecursionError):
        return None
