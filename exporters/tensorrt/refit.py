"""Put another adapter into a finished engine of mode "refit", without building it again.

Only the vectors are refittable.  They are always set to the adapter's values, never changed by a difference: what is in
the engine does not matter, and no order of swaps can add up to a mix.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onelora_compile.errors import ExportError, StateError
from onelora_compile.exporters.jetson.device.core.engine import Engine, RefitWeight, refit
from onelora_compile.exporters.onnx_file.load import load_model, read_tensor
from onelora_compile.exporters.onnx_file.save import data_files
from onelora_compile.exporters.tensorrt.library import Api, find_api
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.exporters.tensorrt.messages import engine_error, in_our_words
from onelora_compile.exporters.tensorrt.vectors import hash_model
from onelora_compile.exporters.tensorrt.write_engine import refuse_overwriting_engine, write_engine
from onelora_compile.file_names import as_file, as_path
from onelora_compile.printable import Printable, bytes_text, shortened
from onelora_compile.table import Table
from onelora_compile.weights.adapter_content import digest
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter

_INSTEAD = {
    "base": "it holds no vectors: build one with adapters='refit' from a model exported with adapters='input'",
    "fold": "its vectors are in its weights: build it again with the other adapter, or once with adapters='refit' or "
    "'input' from a model exported with adapters='input'",
    "input": "its vectors are inputs, which need no refit: EngineRunner(engine).use(adapter)",
    "bank": "its adapters are chosen by the input adapter_ids: EngineRunner(engine).use(adapter)",
}


@dataclasses.dataclass(frozen=True)
class RefitReport(Printable):
    """What `refit_engine` did.

    Attributes:
        files: the engine, its manifest, its vectors.
        vectors: how many were set.
        bytes: of the vectors.
        base_weights: other weights that TensorRT asked for, which got the base's values.
        seconds: wall time.
    """

    files: list[Path]
    vectors: int
    bytes: int
    base_weights: list[str]
    seconds: float

    def __rich__(self) -> Table:
        table = Table(title=f"refitted {self.files[0]}", show_header=False)
        table.add_row("files", "\n".join(str(file) for file in self.files))
        table.add_row("vectors set", f"{self.vectors}, {bytes_text(self.bytes)}")
        if self.base_weights:
            table.add_row("set to the base's values", shortened(self.base_weights))
        table.add_row("time", f"{self.seconds:.1f} s")
        return table


def refit_engine(
    engine: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str] | None = None,
    onnx: str | os.PathLike[str] | None = None,
) -> RefitReport:
    """Put an adapter into an engine that was built with `adapters="refit"`.

    Needs the GPU that the engine is for.

    Args:
        engine: the engine; its manifest is beside it.
        adapter: an adapter file of the engine's base.
        out: the engine to write; None replaces `engine`.
        onnx: the model that the engine was built from. Only needed where TensorRT merged a vector with another weight
            and asks for that too; the error says so.

    Raises:
        StateError: the engine's vectors can't be refitted, or it can't run here; the message says why.
        AdapterFileError, BaseMismatchError: the adapter does not belong to the engine.
        ExportError: TensorRT refused; the files are as they were.
        FileNotFoundError: no engine, or no manifest beside it.
    """
    start = time.perf_counter()
    engine = as_file(engine, "engine")
    out = engine if out is None else as_file(out, "out")
    onnx = None if onnx is None else as_path(onnx, "onnx")
    refuse_overwriting_engine(out, [adapter, onnx, *(data_files(onnx) if onnx is not None else [])])
    manifest = Manifest.read(engine)
    file, values = vectors_for(manifest, engine, adapter)
    manifest.check_file(engine)
    api = find_api(manifest.flavour)
    manifest.check_library(api, engine)
    api.messages.clear()
    opened = load_engine(api, engine, manifest)
    base = refit_loaded(api, opened, values, manifest, engine, onnx)
    name = Path(adapter).name.removesuffix(".safetensors") if not isinstance(adapter, AdapterFile) else ""
    changed = dataclasses.replace(
        manifest, adapter=name, adapter_sha256=digest(values), initial=f"{out.name}.safetensors", engine_sha256=""
    )
    files, _ = write_engine(out, _serialized(api, opened.loaded, engine), changed, file)
    size = sum(one.nbytes for one in values.values())
    return RefitReport(files, len(values), size, base, time.perf_counter() - start)


def vectors_for(
    manifest: Manifest, engine: Path, adapter: str | os.PathLike[str] | AdapterFile
) -> tuple[AdapterFile, dict[str, np.ndarray]]:
    """An adapter for an engine of mode "refit", checked, and its float32 values.

    Raises:
        StateError: the engine is of another mode.
        AdapterFileError, BaseMismatchError: the adapter does not belong to it.
    """
    if not manifest.traits.refits:
        raise StateError(f"{engine} can't be refitted (mode {manifest.mode!r}): {_INSTEAD.get(manifest.mode, '')}")
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    manifest.metadata.check_fits(file, str(engine))
    return file, manifest.metadata.values_of(file)


def load_engine(api: Api, engine: Path, manifest: Manifest) -> Engine:
    """Load an engine.

    Raises:
        ExportError: TensorRT refuses it.
    """
    with in_our_words(engine, api):
        opened = Engine(api.trt, api.logger, engine.read_bytes())
    if manifest.traits.refits and not opened.refittable:
        raise ExportError(f"{engine} is not refittable, though its manifest says so: build it again")
    return opened


def refit_loaded(
    api: Api,
    opened: Engine,
    values: Mapping[str, np.ndarray],
    manifest: Manifest,
    engine: Path,
    onnx: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Set the vectors of a loaded engine; execution contexts stay valid, and must be idle.

    Returns:
        Other weights that had to be set too, to the values of `onnx`.

    Raises:
        ExportError: TensorRT refuses; the loaded engine may then be half changed and must not be used.
    """
    held = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}

    def more(names: list[str]) -> dict[str, RefitWeight]:
        held.update(_base_weights(names, manifest, engine, onnx))
        return {name: _weight(held[name]) for name in names}

    with in_our_words(engine, api, refit=True):
        return refit(opened, {name: _weight(value) for name, value in held.items()}, more)


def _weight(value: np.ndarray) -> RefitWeight:
    return RefitWeight(str(value.dtype), value.ctypes.data, value.size)


def _base_weights(
    names: list[str], manifest: Manifest, engine: Path, onnx: str | os.PathLike[str] | None
) -> dict[str, np.ndarray]:
    """Values of weights that TensorRT merged with vectors."""
    if onnx is None:
        raise ExportError(
            f"{engine}: TensorRT merged vectors with other weights, {shortened(names)}, and needs their values again: "
            "give "
            f"onnx=, the model that the engine was built from ({manifest.onnx})"
        )
    path = Path(onnx)
    model = load_model(path)
    held = model.graph.initializers
    if hash_model(model, path) != manifest.onnx_sha256:
        raise ExportError(f"{path} is not the model that {engine} was built from ({manifest.onnx})")
    if unknown := [name for name in names if name not in held]:
        raise ExportError(
            f"{engine}: {path} has no weights {shortened(unknown)}; build the engine with adapters='input'"
        )
    return {name: np.ascontiguousarray(read_tensor(held[name].const_value)) for name in names}


def _serialized(api: Api, loaded: Any, engine: Path) -> Any:
    """The bytes of an engine of TensorRT's, refittable again."""
    keep = api.flag("SerializationFlag", "INCLUDE_REFIT")  # without it newer versions leave out what refit needs
    if keep is None or not hasattr(loaded, "create_serialization_config"):
        plan = loaded.serialize()
    else:
        serialization = loaded.create_serialization_config()
        serialization.set_flag(keep)
        plan = loaded.serialize_with_config(serialization)
    if plan is None:
        raise engine_error(f"{engine} can't be written", api, refit=True)
    return plan
