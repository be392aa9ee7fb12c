"""How vectors get into an engine: what is done to the ONNX model before TensorRT reads it.

    engine   from ONNX mode    the vectors are
    base     base              not there
    fold     fold, load; base with an adapter file, which is folded first
                               in the weights; of "load" TensorRT adds them while it builds
    input    input             inputs of the engine, one for each vector
    bank     bank              rows of tables, chosen by the input `adapter_ids`
    refit    input             weights that can be replaced in the engine, and nothing else can

A graph input with a default value is a constant to TensorRT: an engine of mode "input" built from the file as it is
would ignore every adapter.  So the defaults are taken out here and travel beside the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onelora_compile.errors import AdapterFileError, ConfigError, StateError, one_of, require
from onelora_compile.exporters.fold.fold import fold_onnx
from onelora_compile.exporters.jetson.device.core.modes import BASE, EXPORTED, MODES, HasMode, Mode
from onelora_compile.exporters.onnx_file.load import load_model, read_tensor
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import digest
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.merge import FoldLoss, fold_weight

if TYPE_CHECKING:
    import onnx_ir

ENGINE_MODES = ("fold", "input", "bank", "refit")


@dataclasses.dataclass(frozen=True)
class Prepared(HasMode):
    """A model as TensorRT gets it.

    Attributes:
        model: the graph; weights in external files are still there.
        path: the file that external weights are beside.
        mode: of the engine: "base" or one of `ENGINE_MODES`.
        metadata: of the ONNX model; with an adapter file, of that adapter.
        vectors: float32 values of the vectors that can be swapped, which the engine starts with.
        losses: what rounding lost where vectors went into weights here or go there in TensorRT, by vector.
        sha256: of the ONNX files as they were given.
        changed: whether `model` is not what is at `path`.
    """

    model: onnx_ir.Model
    path: Path
    mode: str
    metadata: Metadata
    vectors: dict[str, np.ndarray]
    losses: dict[str, FoldLoss]
    sha256: str
    changed: bool

    def content(self) -> bytes | None:
        """The model's bytes, None where they are those of the file at `path`."""
        if not self.changed:
            return None
        ir: Any = require("onnx_ir", "onnx", "read an ONNX model")
        return bytes(ir.to_proto(self.model).SerializeToString())


@contextlib.contextmanager
def prepared(
    onnx: Path,
    mode: str | None,
    adapter: Any,
    scratch: Path | None = None,
    progress: bool = False,
    ranges: Mapping[str, Any] | None = None,
) -> Iterator[Prepared]:
    """Yield the model for an engine of a mode, with an adapter's vectors in it.

    A base that is folded first is written to a folder in `scratch`, which is gone afterwards; `ranges` are the options
    of `fold_onnx` for quantised activations.

    Raises:
        ConfigError: an unknown mode, or one that can't be built from this model; the message says from which.
        StateError: an adapter file for a model whose vectors can't be replaced.
        AdapterFileError, BaseMismatchError: the adapter does not belong to the model.
        ExportError: not an ONNX model, or a damaged one.
    """
    model = load_model(onnx)
    metadata = Metadata.from_props(model.metadata_props, str(onnx))
    chosen = _mode(onnx, metadata.traits, mode, adapter is not None)
    sha256 = hash_model(model, onnx)
    if adapter is not None and metadata.mode != BASE.name and not metadata.traits.takes_files:
        raise StateError(
            f"{onnx} holds its adapter already (mode {metadata.mode!r}): build without adapter=, or export the model "
            "with "
            "adapters='load' or 'input'"
        )
    if adapter is not None and metadata.traits is BASE:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            folded = Path(folder) / onnx.name
            report = fold_onnx(onnx, adapter, folded, progress=progress, **(ranges or {}))
            losses = {name: one.loss for name, one in report.folded.items() if one.loss is not None}
            model = load_model(folded)
            metadata = Metadata.from_props(model.metadata_props, str(onnx))
            yield Prepared(model, folded, chosen, metadata, {}, losses, sha256, False)
        return
    vectors: dict[str, np.ndarray] = {}
    losses = {}
    changed = False
    if metadata.traits.takes_files:
        file = None if adapter is None else adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
        vectors = _values(model, metadata, file, onnx)
        metadata = dataclasses.replace(metadata, sha256=digest(vectors))
        changed = True
        if metadata.traits.rebuilds:
            _set_constants(model, vectors)
            losses = _losses(model, vectors)
            vectors = {}
        elif MODES[chosen].feeds_vectors:
            _make_inputs(model, vectors)
        else:
            _check_distinct(vectors, onnx)
            _set_constants(model, vectors)
    yield Prepared(model, onnx, chosen, metadata, vectors, losses, sha256, changed)


def _mode(onnx: Path, held: Mode, asked: str | None, with_adapter: bool) -> str:
    if asked is not None:
        one_of("adapters", asked, ENGINE_MODES)
    if held is BASE and asked == "fold" and not with_adapter:
        raise ConfigError(f"{onnx} holds no vectors: give adapter= to fold one, or leave adapters= out")
    if asked is None:
        return "fold" if held is BASE and with_adapter else held.engines[0]
    if asked not in held.engines:
        sources = [f"adapters={name!r}" for name in EXPORTED if asked in MODES[name].engines]
        raise ConfigError(
            f"an engine with adapters={asked!r} can't be built from {onnx}, which is of mode {held.name!r}: export the "
            f"model with {' or '.join(sources)}"
        )
    return asked


def _values(model: onnx_ir.Model, metadata: Metadata, file: AdapterFile | None, onnx: Path) -> dict[str, np.ndarray]:
    """The vectors of a file, or those that the model was exported with."""
    held = model.graph.initializers
    if missing := [name for name in metadata.vectors if name not in held or held[name].const_value is None]:
        raise AdapterFileError(
            f"{onnx} says that it has vectors {shortened(missing)} and has no initializers of these names: a tool "
            "renamed or removed them; take the file that export_onnx wrote"
        )
    if file is None:
        return {name: read_tensor(held[name].const_value).astype(np.float32) for name in metadata.vectors}
    metadata.check_fits(file, str(onnx))
    return metadata.values_of(file)


def _make_inputs(model: onnx_ir.Model, vectors: dict[str, np.ndarray]) -> None:
    """Vectors become inputs without a default."""
    graph = model.graph
    for name in vectors:
        value = graph.initializers.pop(name)
        value.const_value = None
        if not any(value is one for one in graph.inputs):
            graph.inputs.append(value)


def _set_constants(model: onnx_ir.Model, vectors: dict[str, np.ndarray]) -> None:
    """Vectors become constants of these values."""
    ir: Any = require("onnx_ir", "onnx", "change an ONNX model")
    graph = model.graph
    for name, numbers in vectors.items():
        value = graph.initializers[name]
        value.const_value = ir.tensor(np.ascontiguousarray(numbers), name=name)
        if value in graph.inputs:
            graph.inputs.remove(value)


def _check_distinct(vectors: dict[str, np.ndarray], onnx: Path) -> None:
    """Equal constants may be merged by the builder, and then one can't be replaced without the other."""
    seen: dict[bytes, str] = {}
    for name, numbers in vectors.items():
        other = seen.setdefault(numbers.tobytes(), name)
        if not numbers.any() or other != name:
            what = "is zero" if not numbers.any() else f"is equal to that of {other!r}"
            raise StateError(
                f"the vector of {name!r} in {onnx} {what}: the builder may merge equal weights, so a refittable "
                "engine is "
                "built with a trained adapter; give adapter="
            )


def _losses(model: onnx_ir.Model, vectors: dict[str, np.ndarray]) -> dict[str, FoldLoss]:
    """What rounding loses of W + v where both are constants of the graph, as TensorRT adds them."""
    found = {}
    for name in vectors:
        value = model.graph.initializers[name]
        for use in value.uses():
            weight, update = _sum_of(use.node, value)
            if weight is None:
                continue
            stored = torch.from_numpy(np.array(weight.numpy()))
            axes = tuple(axis for axis, size in enumerate(update.shape) if size == 1 and stored.shape[axis] != 1)
            vector = torch.from_numpy(np.squeeze(update, axes))
            _, found[name] = fold_weight(stored, vector, axes)
    return found


def _sum_of(node: onnx_ir.Node, value: onnx_ir.Value) -> tuple[Any, np.ndarray]:
    """W and the broadcast form of v of `W + v`, from the first node that reads v; W is None for another form."""
    update = value.const_value.numpy() if value.const_value is not None else np.zeros(())
    while node.op_type in ("Cast", "Unsqueeze", "Reshape", "Identity"):
        if node.op_type == "Unsqueeze":
            axes = node.inputs[1].const_value if node.inputs[1] is not None else None
            if axes is None:
                return None, update
            update = np.expand_dims(update, tuple(int(axis) for axis in axes.numpy()))
        elif node.op_type == "Reshape":
            return None, update
        uses = list(node.outputs[0].uses())
        if len(uses) != 1:
            return None, update
        value, node = node.outputs[0], uses[0].node
    if node.op_type != "Add":
        return None, update
    other = next((one for one in node.inputs if one is not value), None)
    producer = other.producer() if other is not None else None
    if producer is not None and producer.op_type == "Cast":
        other = producer.inputs[0]
    weight = other.const_value if other is not None else None
    return (weight, update) if weight is not None and len(weight.shape) == update.ndim else (None, update)


def hash_model(model: onnx_ir.Model, onnx: Path) -> str:
    """SHA-256 of a model's file and the files of its external weights."""
    tensors: list[Any] = [value.const_value for value in model.graph.initializers.values()]
    external = {onnx.parent / str(tensor.location) for tensor in tensors if hasattr(tensor, "location")}
    return hash_files([onnx, *sorted(external)])


def hash_files(files: list[Path]) -> str:
    """SHA-256 of the files' bytes one after the other."""
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                sha.update(chunk)
    return sha.hexdigest()
