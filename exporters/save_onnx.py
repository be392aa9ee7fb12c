"""Writing an ONNX model so that a killed process leaves the old model or the new one, weights included."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onelora_compile.files import flush, replacing

if TYPE_CHECKING:
    import onnx_ir

EXTERNAL_FROM = 1_900_000_000  # bytes; a protobuf file can't be larger than 2 GiB


def weight_bytes(model: onnx_ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def save_model(
    model: onnx_ir.Model,
    path: Path,
    external_data: bool | None = None,
    check: Callable[[Path], None] | None = None,
    apart: Sequence[str] = (),
    written: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write `model` to `path`, and its weights beside it where one file can't hold them.

    Args:
        model: the model; its initializers may point into the file that is replaced.
        path: replaced in one step if it exists.
        external_data: True puts the weights into `<path>.data` in any case; None only above 1.9 GB.
        check: called with the complete file before it gets its name; what it raises leaves everything as it was.
        written: called after each tensor that goes into an external file.
        apart: initializers that go into a file of their own, `<path>.vectors`, whatever their size.

    Returns:
        The files that make up the model.

    Raises:
        OSError: the folder can't be written; nothing is left behind then.
    """
    import onnx_ir

    if external_data is None:
        external_data = weight_bytes(model) > EXTERNAL_FROM
    old = external_files(path)
    with contextlib.ExitStack() as undo, replacing(path) as beside:
        files = [path]
        if external_data:
            data = _fresh(path, "data")
            undo.callback(data.unlink, missing_ok=True)
            try:
                onnx_ir.external_data.unload_from_model(
                    model, path.parent, data.name, size_threshold_bytes=256, callback=lambda *_: written()
                )
            except OSError as error:
                if error.errno is not None:
                    raise
                # numpy says how many numbers it could not write, and not why.
                raise OSError(
                    f"can't write {data}: {error}; the disk is full, or a file may not be so large"
                ) from error
            flush(data)
            files.append(data)
        if apart:
            own = _fresh(path, "vectors")
            undo.callback(own.unlink, missing_ok=True)
            _write_apart(model, apart, own)
            files.append(own)
        onnx_ir.save(model, beside)
        if check is not None:
            check(beside)
        undo.pop_all()
    for stale in set(old) - set(files):
        stale.unlink(missing_ok=True)
    return files


def _fresh(path: Path, kind: str) -> Path:
    """A new name, unless the plain one is free: until the model file is replaced, the old one needs its old files."""
    file = path.with_name(f"{path.name}.{kind}")
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.{kind}") if file.exists() else file


def _write_apart(model: onnx_ir.Model, names: Sequence[str], file: Path) -> None:
    """Write initializers to a file of their own and let the model point there."""
    import onnx_ir

    offset = 0
    with open(file, "wb") as stream:
        for name in names:
            value = model.graph.initializers[name]
            assert value.const_value is not None
            raw = value.const_value.tobytes()
            shape, dtype = value.const_value.shape, value.const_value.dtype
            assert isinstance(shape, onnx_ir.Shape)
            value.const_value = onnx_ir.ExternalTensor(
                file.name, offset, len(raw), dtype, shape=shape, name=name, base_dir=file.parent
            )
            stream.write(raw)
            offset += len(raw)
    flush(file)


def external_files(path: Path) -> list[Path]:
    """The files of weights that belong to the model at `path`, by the names that `save_model` gives."""
    if not path.is_file():
        return []
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.(data|vectors)")
    return [file for file in path.parent.iterdir() if own.fullmatch(file.name)]
