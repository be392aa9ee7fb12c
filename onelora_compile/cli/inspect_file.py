"""What `onelora inspect` shows of a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from onelora_compile.cli.inspect_folder import BundleContent, bundle_content, is_bundle, refuse_unknown
from onelora_compile.printable import Printable, bytes_text
from onelora_compile.table import Table, grouped, spread
from onelora_compile.weights.adapter_content import Part
from onelora_compile.weights.adapter_file import read_adapter
from onelora_compile.weights.file_kinds import GGUF_FILE
from onelora_compile.weights.gguf_read import read_gguf
from onelora_compile.weights.hub_download import fetched

if TYPE_CHECKING:
    from onelora_compile.exporters.onnx_file.metadata import Metadata
    from onelora_compile.exporters.tensorrt.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class VectorContent:
    """One vector of a file.

    Attributes:
        shape: of the vector.
        base_shape: of the weight that it belongs to; None where the file does not say, and so are the next two.
        base_dtype: of that weight.
        base_norm: Frobenius norm of that weight.
        relative: Frobenius norm of b 1ᵀ over that of the weight; None also where the file has no values.
    """

    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    base_dtype: str | None
    base_norm: float | None
    relative: float | None

    @property
    def _alike(self) -> tuple[str, ...]:
        return _shape(self.shape), _shape(self.base_shape), self.base_dtype or "-"


@dataclasses.dataclass(frozen=True)
class AdapterContent(Printable):
    """What an adapter file holds.

    Attributes:
        file: where it is.
        bytes: its size.
        producer: what wrote it.
        vectors: by name.
        numbers: in all vectors.
        saved: shapes of the other trained tensors.
        config: how the model was adapted.
        parts: the adapters that it is the sum of, if it is one.
    """

    file: Path
    bytes: int
    producer: str
    vectors: dict[str, VectorContent]
    numbers: int
    saved: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    parts: list[Part]

    def __rich__(self) -> RenderableType:
        title = f"{self.file}: 1LoRA adapter, {bytes_text(self.bytes)}, by {self.producer}"
        table = Table("module", "vector", "base weight", "base dtype", "norm of b 1ᵀ / norm of W", title=title)
        for name, ones in grouped(self.vectors.items(), alike=lambda one: one._alike).items():
            ratios = [one.relative for one in ones if one.relative is not None]
            table.add_row(name, *ones[0]._alike, spread(ratios, ".2e") if ratios else "-")
        lines = [f"{len(self.vectors)} vectors, {self.numbers:,} numbers"]
        trained = grouped(self.saved.items(), alike=tuple)
        lines += [f"also trained: {name} {_shape(shapes[0])}" for name, shapes in trained.items()]
        lines += [f"sum: {part.weight:.12g} * {part.name}, sha256 {part.digest[:16]}" for part in self.parts]
        lines.append("config: " + ", ".join(f"{name} {_text(value)}" for name, value in self.config.items()))
        return Group(table, *lines)


@dataclasses.dataclass(frozen=True)
class ModelContent(Printable):
    """What an ONNX model holds.

    Attributes:
        file: where it is.
        bytes: of all its files.
        files: the names of them.
        opsets: version by domain; "" is the standard one's.
        inputs: dtype and shape of those that a call gives.
        outputs: likewise.
        nodes: how many the main graph has.
        mode: where the vectors are; None where the file does not say.
        adapters: the names of those in it.
        sha256: of the vectors.
        producer: what wrote it.
        vectors: by name.
    """

    file: Path
    bytes: int
    files: list[str]
    opsets: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    nodes: int
    mode: str | None
    adapters: list[str]
    sha256: str
    producer: str
    vectors: dict[str, VectorContent]

    def __rich__(self) -> RenderableType:
        table = Table("", "", title=f"{self.file}: ONNX model", show_header=False)
        table.add_row("size", bytes_text(self.bytes))
        table.add_row("files", ", ".join(self.files))
        table.add_row("opset", ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in self.opsets.items()))
        table.add_row("inputs", "\n".join(f"{name}: {kind}" for name, kind in self.inputs.items()))
        table.add_row("outputs", "\n".join(f"{name}: {kind}" for name, kind in self.outputs.items()))
        table.add_row("nodes", str(self.nodes))
        table.add_row("adapter", self._adapter())
        if self.adapters:
            numbered = [f"{number} {name}" for number, name in enumerate(self.adapters)]
            table.add_row("adapters", "\n".join(numbered if self.mode == "bank" else self.adapters))
        table.add_row("written by", self.producer)
        return Group(table, self._vectors()) if self.vectors else table

    def _adapter(self) -> str:
        if self.mode is None:
            return "none recorded"
        if self.mode == "base":
            return "none (exported from a base)"
        return f"mode {self.mode!r}, {len(self.vectors)} vectors, sha256 {self.sha256[:16]}"

    def _vectors(self) -> Table:
        title = "vectors, and the base weights that they belong to"
        table = Table("vector", "shape", "base weight", "base dtype", "norm of W", title=title)
        for name, ones in grouped(self.vectors.items(), alike=lambda one: one._alike).items():
            norms = [one.base_norm for one in ones if one.base_norm is not None]
            table.add_row(name, *ones[0]._alike, spread(norms, ".4g") if norms else "-")
        return table


@dataclasses.dataclass(frozen=True)
class EngineContent(Printable):
    """What an engine is for, from its manifest.

    Attributes:
        file: where it is.
        bytes: of the engine.
        manifest: what is written beside it.
    """

    file: Path
    bytes: int
    manifest: Manifest

    def __rich__(self) -> RenderableType:
        from onelora_compile.exporters.tensorrt.library import TITLES

        one = self.manifest
        title = f"{self.file}: engine of {TITLES.get(one.flavour, '')} {one.version}"
        table = Table("", "", title=title, show_header=False)
        table.add_row("size", bytes_text(self.bytes))
        table.add_row("for", f"{', '.join(one.targets) or 'the default devices'}, {one.system} {one.l4t}")
        table.add_row("computes in", one.precision)
        table.add_row("from", f"{one.onnx}, sha256 {one.onnx_sha256[:16]}")
        adapter = one.adapter or ", ".join(one.adapters) or "unnamed"
        digest = f", sha256 {one.adapter_sha256[:16]}" if one.adapter_sha256 else ""
        table.add_row("adapters", f"mode {one.mode!r}, {len(one.vectors)} vectors, {adapter}{digest}")
        given = [value for value in one.inputs if value.name not in one.vectors]
        table.add_row("inputs", "\n".join(f"{value.name}: {value.dtype} {_shape(value.shape)}" for value in given))
        made = (f"{value.name}: {value.dtype} {_shape(value.shape)}" for value in one.outputs)
        table.add_row("outputs", "\n".join(made))
        for number, profile in enumerate(one.profiles):
            lines = [f"{name} {' | '.join(map(_shape, shapes))}" for name, shapes in profile.items()]
            table.add_row(f"profile {number}", "\n".join(lines))
        if one.flags:
            table.add_row("options", ", ".join(f"{name} {value}" for name, value in one.flags.items()))
        table.add_row("written by", one.producer)
        return table


Content = AdapterContent | ModelContent | EngineContent | BundleContent


def inspect_file(path: Path) -> Content:
    """What an adapter (a file, a folder of PEFT, or an id on the Hub), an ONNX model, an engine or a bundle holds.

    Raises:
        AdapterFileError: no adapter file, or damaged; a folder of something else.
        ExportError: no ONNX model or manifest of an engine or bundle, or damaged, or of another engine.
        FileNotFoundError: there is no such file.
    """
    if path.is_dir() and is_bundle(path):
        return bundle_content(path)
    path = fetched(path)
    if path.is_dir():
        refuse_unknown(path)
        return _adapter(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.with_name(f"{path.name}.json").is_file() or path.suffix in (".engine", ".plan", ".trt"):
        return _engine(path)
    return _model(path) if path.suffix == ".onnx" else _adapter(path)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.iterdir())


def _adapter(path: Path) -> AdapterContent:
    file = read_gguf(path, ordered=False) if path.suffix == GGUF_FILE else read_adapter(path)
    vectors = {}
    for name, vector in file.vectors.items():
        base = file.fingerprints.get(name)
        if base is None:
            vectors[name] = VectorContent(tuple(vector.shape), None, None, None, None)
            continue
        update = float(vector.double().norm()) * base.shape[1] ** 0.5  # Frobenius norm of b 1ᵀ
        ratio = update / base.norm if base.norm else None
        vectors[name] = VectorContent(tuple(vector.shape), tuple(base.shape), base.dtype, base.norm, ratio)
    return AdapterContent(
        file=path,
        bytes=size_of(path),
        producer=file.producer,
        vectors=vectors,
        numbers=sum(vector.numel() for vector in file.vectors.values()),
        saved={name: tuple(tensor.shape) for name, tensor in file.saved.items()},
        config=json.loads(file.config.to_json()),
        parts=list(file.parts),
    )


def _model(path: Path) -> ModelContent:
    from onelora_compile.exporters.onnx_file.load import load_model
    from onelora_compile.exporters.onnx_file.metadata import Metadata

    model = load_model(path)
    metadata = Metadata.from_props(model.metadata_props, str(path))
    held: list[Any] = [value.const_value for value in model.graph.initializers.values()]
    files = {path} | {path.parent / str(tensor.location) for tensor in held if hasattr(tensor, "location")}
    tool = f"{model.producer_name or 'unknown'} {model.producer_version or ''}".strip()
    return ModelContent(
        file=path,
        bytes=sum(file.stat().st_size for file in files if file.is_file()),
        files=sorted(file.name for file in files),
        opsets={domain: int(version) for domain, version in model.opset_imports.items()},
        inputs={str(v.name): f"{v.dtype} {v.shape}" for v in model.graph.inputs if v.name not in metadata.vectors},
        outputs={str(v.name): f"{v.dtype} {v.shape}" for v in model.graph.outputs},
        nodes=len(model.graph),
        mode=metadata.mode if "onelora.mode" in model.metadata_props else None,
        adapters=list(metadata.adapters),
        sha256=metadata.sha256,
        producer=metadata.producer or tool,
        vectors={name: _recorded(metadata, name, shape) for name, shape in metadata.vectors.items()},
    )


def _recorded(metadata: Metadata, name: str, shape: Any) -> VectorContent:
    base = metadata.fingerprints.get(name)
    if base is None:
        return VectorContent(tuple(shape), None, None, None, None)
    return VectorContent(tuple(shape), tuple(base.shape), base.dtype, base.norm, None)


def _engine(path: Path) -> EngineContent:
    from onelora_compile.exporters.tensorrt.manifest import Manifest

    manifest = Manifest.read(path)
    manifest.check_file(path)
    return EngineContent(path, path.stat().st_size, manifest)


def _shape(shape: Any) -> str:
    return str(list(shape)) if shape is not None else "-"


def _text(value: Any) -> str:
    return json.dumps(value)
