"""What `onelora inspect` shows of a folder: a bundle, or which of its files to inspect."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onelora_compile.errors import AdapterFileError, ExportError
from onelora_compile.printable import Printable, bytes_text, shortened
from onelora_compile.table import Table
from onelora_compile.weights.file_kinds import IN_FOLDERS, OF_DIFFUSERS
from onelora_compile.weights.peft_config import CONFIG

_SHOWN = (".onnx", ".safetensors", ".engine", ".plan", ".trt")


@dataclasses.dataclass(frozen=True)
class BundleContent(Printable):
    """What a bundle for a Jetson holds, from its manifest.

    Attributes:
        folder: where it is.
        bytes: of all its files.
        device: what it is made for: JetPack, TensorRT and others, by name.
        mode: how an adapter reaches the model.
        model: its file.
        source_sha256: of the model that it was made of.
        opset: of the model.
        dtypes: of its weights.
        vectors: shape of each that can be exchanged, by name.
        adapters: that came with it, and that were installed since.
        in_use: the adapter that the next run takes.
        engines: files that were built in it.
        damaged: files that are missing or not as they were packed.
        producer: what wrote it.
    """

    folder: Path
    bytes: int
    device: dict[str, str]
    mode: str
    model: str
    source_sha256: str
    opset: int
    dtypes: list[str]
    vectors: dict[str, tuple[int, ...]]
    adapters: list[str]
    in_use: str
    engines: list[str]
    damaged: list[str]
    producer: str

    def __rich__(self) -> Table:
        table = Table("", "", title=f"{self.folder}: bundle for a Jetson", show_header=False)
        table.add_row("size", bytes_text(self.bytes))
        table.add_row("for", ", ".join(f"{name} {value}" for name, value in self.device.items()))
        table.add_row("mode", self.mode)
        table.add_row("model", f"{self.model}, opset {self.opset}, {', '.join(self.dtypes)}")
        table.add_row("from", f"a model of sha256 {self.source_sha256[:16]}")
        table.add_row("vectors", f"{len(self.vectors)} that can be exchanged")
        table.add_row("adapters", "\n".join(self.adapters))
        table.add_row("in use", self.in_use)
        table.add_row("engines", "\n".join(self.engines) or "none yet: python3 build_and_run.py build, on the device")
        table.add_row("files", "\n".join(self.damaged) or "all as they were packed")
        table.add_row("written by", self.producer)
        return table


def is_bundle(path: Path) -> bool:
    """Whether a folder holds the program of a bundle and its manifest."""
    return (path / "manifest.json").is_file() and (path / "build_and_run.py").is_file()


def bundle_content(path: Path) -> BundleContent:
    """What a bundle holds.

    Raises:
        ExportError: a damaged manifest, or one of a newer format.
    """
    from onelora_compile.exporters.jetson.device.folder import BundleError, Folder

    try:
        folder = Folder(str(path))
        manifest = folder.manifest
        model = manifest["model"]
        return BundleContent(
            folder=path,
            bytes=sum(one.stat().st_size for one in path.rglob("*") if one.is_file()),
            device={str(name): _text(value) for name, value in manifest["device"].items()},
            mode=folder.mode,
            model=str(model["file"]),
            source_sha256=str(model["source_sha256"]),
            opset=int(model["opset"]),
            dtypes=[str(one) for one in model["dtypes"]],
            vectors={str(name): tuple(shape) for name, shape in manifest["vectors"].items()},
            adapters=list(dict.fromkeys([*folder.packed(), *folder.installed()])),
            in_use=str(folder.state()["adapter"]["name"]),
            engines=sorted(str(one.relative_to(path)) for one in path.rglob("*.engine")),
            damaged=folder.damaged(),
            producer=str(manifest["producer"]),
        )
    except BundleError as error:
        raise ExportError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{path} is a bundle with a damaged manifest: {error!r}") from error


def refuse_unknown(path: Path) -> None:
    """Check that a folder holds an adapter.

    Raises:
        AdapterFileError: it does not; the message names what in it can be inspected.
    """
    held = sorted(path.iterdir())
    if any(one.name in (CONFIG, IN_FOLDERS, OF_DIFFUSERS) for one in held):
        return
    inside = [str(one) for one in held if one.is_file() and one.suffix in _SHOWN]
    inside += [
        str(one)
        for one in held
        if one.is_dir()
        and (is_bundle(one) or any((one / name).is_file() for name in (CONFIG, IN_FOLDERS, OF_DIFFUSERS)))
    ]
    listed = f"; inspect one of {shortened(inside)}" if inside else ", and holds nothing that can be inspected"
    raise AdapterFileError(
        f"{path} is no adapter of PEFT (it has no {CONFIG}), no folder with {IN_FOLDERS} or {OF_DIFFUSERS}, and no "
        f"bundle{listed}"
    )


def _text(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
