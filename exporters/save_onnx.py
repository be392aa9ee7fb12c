"""Writing an ONNX model so that a killed process leaves the old model or the new one, weights included."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable
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
) -> list[Path]:
    """Write `model` to `path`, and its weights beside it where one file can't hold them.

    Args:
        model: the model; its initializers may point into the file that is replaced.
        path: replaced in one step if it exists.
        external_data: True puts the weights into `<path>.data` in any case; None only above 1.9 GB.
        check: called with the complete file before it gets its name; what it raises leaves everything as it was.

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
            # A new name, unless it is free: until the model file is replaced, the old one needs the old weights.
            data = path.with_name(f"{path.name}.data")
            if data.exists():
                data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
            undo.callback(data.unlink, missing_ok=True)
            onnx_ir.save(model, beside, external_data=data.name)
            flush(data)
            files.append(data)
        else:
            onnx_ir.save(model, beside)
        if check is not None:
            check(beside)
        undo.pop_all()
    for stale in set(old) - set(files):
        stale.unlink(missing_ok=True)
    return files


def external_files(path: Path) -> list[Path]:
    """The files of weights that belong to the model at `path`, by the names that `save_model` gives."""
    if not path.is_file():
        return []
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    return [file for file in path.parent.iterdir() if own.fullmatch(file.name)]
