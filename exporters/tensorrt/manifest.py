"""What stands beside an engine, in `<engine>.json`: what it was built from and for, and so where it may run.

An engine is bytes of one version of TensorRT for one kind of GPU.  Loaded elsewhere it fails with an assertion, or
runs and is wrong; loaded with the wrong adapter it is wrong in silence.  So nothing here loads an engine without its
manifest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelora_compile.errors import ExportError, StateError
from onelora_compile.exporters.jetson.device.core.modes import MODES, HasMode
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.tensorrt.library import TITLES, Api
from onelora_compile.exporters.tensorrt.vectors import hash_files
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import digest, float32
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.fingerprint import Fingerprint

FORMAT_VERSION = 2
_SINCE_2: dict[str, Any] = {"trained": {}, "constant": {}, "digests": []}  # what older manifests do not have


@dataclasses.dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine; -1 is a dynamic dimension, dtype is ONNX's name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Manifest(HasMode):
    """All that is known of an engine.

    Attributes:
        flavour: "tensorrt" or "rtx".
        version: of the library that built it.
        targets: devices it was built for, ("sm_86",); () if that is up to the library, or was not known.
        device: name of the GPU that built it, "" without one.
        system: for example "Linux x86_64".
        l4t: release of a Jetson's system, "" elsewhere.
        engine_sha256: of the engine.
        onnx: name of the model.
        onnx_sha256: of the model and its external files.
        mode: "base", "fold", "input", "bank" or "refit".
        adapter: name of the adapter that is in the engine or beside it, "" if that is not known.
        adapter_sha256: of its vectors.
        adapters: names of the adapters of a bank.
        vectors: shape of each vector.
        fingerprints: of the base weights.
        trained: as in `Metadata`, and so are `constant` and `digests`.
        inputs: of the engine, vectors and ids of a bank too.
        outputs: of the engine.
        profiles: for each, (min, opt, max) of the dynamic inputs.
        precision: what the engine computes in, for people.
        flags: what else it was built with.
        initial: file of the vectors that an engine of mode "input" or "refit" starts with, beside the engine.
        producer: what wrote it.
    """

    flavour: str
    version: str
    mode: str
    onnx: str
    onnx_sha256: str
    system: str
    targets: tuple[str, ...] = ()
    device: str = ""
    l4t: str = ""
    engine_sha256: str = ""
    adapter: str = ""
    adapter_sha256: str = ""
    adapters: tuple[str, ...] = ()
    vectors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    fingerprints: Mapping[str, Fingerprint] = dataclasses.field(default_factory=dict)
    trained: Mapping[str, Fingerprint] = dataclasses.field(default_factory=dict)
    constant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digests: tuple[str, ...] = ()
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...] = ()
    precision: str = ""
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    initial: str = ""
    producer: str = f"onelora-compile {__version__}"

    def to_json(self) -> str:
        """The content of `<engine>.json`."""
        fields = {"format": "onelora-engine", "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        for prints in ("fingerprints", "trained"):
            fields[prints] = {name: one.to_json() for name, one in getattr(self, prints).items()}
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def read(cls, engine: str | os.PathLike[str]) -> Manifest:
        """The manifest beside an engine.

        Raises:
            FileNotFoundError: no engine, or no manifest beside it.
            ExportError: a damaged manifest, or one of a newer version.
        """
        engine = Path(engine)
        path = manifest_path(engine)
        if not engine.is_file():
            raise FileNotFoundError(f"there is no engine {engine}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: an engine travels with its manifest, which says where it may run; copy it too, or "
                "build the engine with build_engine"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != "onelora-engine" or not isinstance(raw["format_version"], int):
                raise ValueError("not a manifest of an engine")
            if raw["format_version"] > FORMAT_VERSION:
                raise ExportError(
                    f"{path} has format version {raw['format_version']}; this onelora-compile {__version__} reads up "
                    "to "
                    f"{FORMAT_VERSION}: upgrade it with pip install -U onelora-compile"
                )
            if raw["mode"] not in MODES:
                raise ValueError(f"no mode {raw['mode']!r}")
            raw = {**_SINCE_2, **raw} if raw["format_version"] < 2 else raw
            return cls(**_typed({field.name: raw[field.name] for field in dataclasses.fields(cls)}))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ExportError(f"{path} is not a manifest of an engine, or is damaged: {error!r}") from error

    @property
    def metadata(self) -> Metadata:
        """The same of the vectors, as an ONNX model's metadata: what checks that an adapter belongs here."""
        return Metadata(
            mode=self.mode,
            vectors=self.vectors,
            fingerprints=self.fingerprints,
            trained=self.trained,
            constant=self.constant,
            adapters=self.adapters,
            digests=self.digests,
            sha256=self.adapter_sha256,
            producer=self.producer,
        )

    def initial_adapter(self, engine: Path) -> AdapterFile:
        """The vectors that the engine starts with.

        Raises:
            ExportError: the file is missing or another one.
        """
        path = engine.with_name(self.initial)
        if not self.initial or not path.is_file():
            raise ExportError(f"{path}, the vectors that {engine} starts with, is missing: copy it with the engine")
        file = read_adapter(path)
        if digest({name: float32(value) for name, value in file.tensors.items()}) != self.adapter_sha256:
            raise ExportError(f"{path} does not hold the vectors that {engine} was built with: copy both again")
        return file

    def check_file(self, engine: Path) -> None:
        """Whether the engine is the one that this manifest was written for.

        Raises:
            ExportError: it is not.
        """
        if (found := hash_files([engine])) != self.engine_sha256:
            raise ExportError(
                f"{engine} is not the engine that {manifest_path(engine).name} was written for (sha256 {found[:16]}, "
                f"there {self.engine_sha256[:16]}): one of the two was replaced or damaged; copy both again"
            )

    def check_library(self, api: Api, engine: Path) -> None:
        """Whether a library may load the engine.

        Raises:
            StateError: another product or version, or another kind of machine; the message says which.
        """
        built, here = f"{TITLES.get(self.flavour, self.flavour)} {self.version}", api.title
        reasons = [f"it was built by {built}, here is {here}"] if built != here else []
        if self.system != system():
            reasons.append(f"it was built on {self.system}, here is {system()}")
        self._refuse(engine, reasons)

    def check_device(self, target: str, engine: Path) -> None:
        """Whether a device ("sm_86") may run the engine.

        Raises:
            StateError: it was built for others.
        """
        if self.targets and target not in self.targets:
            self._refuse(engine, [f"it was built for {', '.join(self.targets)}, this GPU is {target}"])

    def _refuse(self, engine: Path, reasons: list[str]) -> None:
        if reasons:
            raise StateError(
                f"{engine} can't run here: {'; '.join(reasons)}. Build it again here from {self.onnx} with "
                "build_engine "
                "or onelora engine"
            )


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine is."""
    return engine.with_name(f"{engine.name}.json")


def system() -> str:
    """Operating system and processor, which an engine does not leave."""
    return f"{platform.system()} {platform.machine()}"


def l4t_release() -> str:
    """The release of a Jetson's system, for example "36.4.3"; "" elsewhere."""
    path = Path("/etc/nv_tegra_release")
    if not path.is_file():
        return ""
    words = path.read_text(encoding="utf-8", errors="replace").replace(",", " ").split()
    release = next((word[1:] for word in words if word[:1] == "R" and word[1:].isdecimal()), "")
    revision = words[words.index("REVISION:") + 1] if "REVISION:" in words else ""
    return f"{release}.{revision}".strip(".")


def _typed(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of JSON with the types of `Manifest`."""
    for key in ("targets", "adapters", "digests"):
        raw[key] = tuple(map(str, raw[key]))
    raw["constant"] = {str(name): str(one) for name, one in raw["constant"].items()}
    raw["vectors"] = {str(name): tuple(map(int, shape)) for name, shape in raw["vectors"].items()}
    for key in ("fingerprints", "trained"):
        raw[key] = {str(name): Fingerprint.from_json(one) for name, one in raw[key].items()}
    for key in ("inputs", "outputs"):
        raw[key] = tuple(EngineTensor(one["name"], one["dtype"], tuple(map(int, one["shape"]))) for one in raw[key])
    raw["profiles"] = tuple(
        {str(name): tuple(tuple(map(int, shape)) for shape in shapes) for name, shapes in one.items()}
        for one in raw["profiles"]
    )
    return raw
