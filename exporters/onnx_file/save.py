"""Writing an ONNX model so that a killed process leaves the old model or the new one, weights included."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onelora_compile.errors import ExportError
from onelora_compile.exporters.onnx_file.load import files_named
from onelora_compile.exporters.onnx_file.metadata import PRODUCER_KEY
from onelora_compile.exporters.onnx_file.overridable import FIRST, fix
from onelora_compile.weights.atomic_write import alone, flush, remove_file, replacing

if TYPE_CHECKING:
    import onnx_ir

EXTERNAL_FROM = 1_900_000_000  # bytes; a protobuf file can't be larger than 2 GiB
_LONGEST = 240  # bytes of a file's name, of 255: whoever writes it adds to it meanwhile
_WEIGHTS = (".data", ".vectors", ".safetensors", ".bin")  # endings of files that name no others


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

    A link at `path` is replaced, not followed: weights stand beside the name that the model is opened by.  Of several
    that write to one path at a time the last one wins, whole.  The old model's weights are removed if this package
    wrote them and no other file beside them names them.

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
        OSError: the folder can't be written, the disk is full; nothing is left behind then.
    """
    import onnx_ir

    if external_data is None:
        external_data = weight_bytes(model) > EXTERNAL_FROM
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as lock:
        files = [path]
        with replacing(path, follow=False) as beside:
            if external_data:
                data = _fresh(path, "data")
                undo.callback(remove_file, data)
                _write_external(model, path, data, written)
                files.append(data)
            else:
                onnx_ir.external_data.load_to_model(model)  # what lies in the files of another model
            if apart:
                own = _fresh(path, "vectors")
                undo.callback(remove_file, own)
                _write_apart(model, apart, own)
                files.append(own)
            _fit_ir_version(model)
            onnx_ir.save(model, beside)
            if check is not None:
                with _named(beside, path):
                    check(beside)
            lock.enter_context(alone(path.parent))  # whoever replaces a model knows which one that was
            old = _weights_of(path)
        undo.pop_all()
    _remove_unnamed(path, set(old) - set(files))
    return files


@contextlib.contextmanager
def _named(beside: Path, path: Path) -> Iterator[None]:
    """Let what is said of a file that has not its name yet be said of its name."""
    try:
        yield
    except ExportError as error:
        raise ExportError(str(error).replace(str(beside), str(path))) from error


def _write_external(model: onnx_ir.Model, path: Path, data: Path, written: Callable[[], None]) -> None:
    import onnx_ir

    try:
        onnx_ir.external_data.unload_from_model(
            model, path.parent, data.name, size_threshold_bytes=256, callback=lambda *_: written()
        )
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy says how many numbers it could not write, and not why.
        raise OSError(f"can't write {data}: {error}; the disk is full, or a file may not be so large") from error
    flush(data)


def _fresh(path: Path, kind: str) -> Path:
    """A new, empty file for weights: of the plain name if that is free, so that nobody else takes it meanwhile."""
    for middle in ("", *(f".{secrets.token_hex(4)}" for _ in range(100))):
        ending = f"{middle}.{kind}"
        file = path.with_name(_stem(path) + ending)
        try:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return file
    raise FileExistsError(f"no free name for the weights of {path}")


def _stem(path: Path) -> str:
    """What the names of a model's weights begin with: its own name, as far as a name may be long.

    Two dots in a row become one: onnx.checker takes them, anywhere in a name, for a way out of the folder.
    """
    room = _LONGEST - len(f".{'0' * 8}.vectors")
    return re.sub(r"\.+", ".", path.name).encode()[:room].decode(errors="ignore").rstrip(".")


def _fit_ir_version(model: onnx_ir.Model) -> None:
    """IR versions before 4 take each initializer for an input too, which one that a tool added is not."""
    graphs = [model.graph, *model.graph.subgraphs()]
    held = [value for graph in graphs for value in graph.initializers.values()]
    if model.ir_version >= FIRST or all(value.is_graph_input() for value in held):
        return
    model.ir_version = FIRST
    for value in list(model.graph.initializers.values()):  # constants until now, and no inputs of a call
        fix(value)


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


def _weights_of(path: Path) -> list[Path]:
    """The files of weights that belong to the model at `path` alone: written by this package, and named in it."""
    if not path.is_file() or path.is_symlink() or not _holds(path, PRODUCER_KEY):
        return []
    own = re.compile(re.escape(_stem(path)) + r"(\.[0-9a-f]{8})?\.(data|vectors)")
    found = [file for file in path.parent.iterdir() if own.fullmatch(file.name)]
    return [file for file in found if _holds(path, file.name)]


def _remove_unnamed(path: Path, stale: set[Path]) -> None:
    """Remove weights of the model that was there, unless a file beside them names them: a copy, another model.

    The model that is there by now may be another process's, and is such a file too.
    """
    if not stale:
        return
    with contextlib.suppress(OSError), alone(path.parent):  # the new model is there: no reason to fail
        beside = [file for file in path.parent.iterdir() if file.is_file() and file.suffix not in _WEIGHTS]
        for file in stale:
            if not any(_holds(one, file.name) for one in beside):
                remove_file(file)


def bytes_of(files: Sequence[Path]) -> int:
    """Bytes of files together; what another writer of the same model has replaced by now counts nothing."""
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def data_files(path: Path) -> list[Path]:
    """The files of weights that a model names; none of what is no model, which its reader refuses."""
    import onnx_ir

    try:
        return files_named(onnx_ir.load(path), path)
    except Exception:  # protobuf and onnx_ir raise many kinds
        return []


def _holds(file: Path, text: str) -> bool:
    """Whether a text stands in a file; one that can't be read might."""
    try:
        with open(file, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return False
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(text.encode()) >= 0
    except OSError:
        return True
