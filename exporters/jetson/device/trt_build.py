"""Build an engine with the TensorRT of this device: 8.5 to 11, by what it has, not by its number."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from typing import Any

from . import trt_module
from .adapters import vectors_of
from .core.library import flag, logger
from .core.messages import Refused
from .core.progress import Line, building
from .cuda import Cuda, board
from .folder import BundleError, Folder, sha256_of, sweep, write_atomically
from .options import Options


class Plan:
    """Where the engine of a bundle is on this device, and what it was built with.

    Args:
        folder: the bundle.
        trt: the module.
        sm: compute capability, "8.7".
        adapter: of the state; its vectors are in the engine in mode "load", elsewhere it does not matter.
    """

    def __init__(self, folder: Folder, trt: Any, sm: str, adapter: dict[str, Any]) -> None:
        self.identity = {
            "module": str(trt.__name__),
            "version": str(trt.__version__),
            "sm": sm,
            "model": folder.manifest["model"]["sha256"],
            "adapter": adapter["sha256"] if folder.mode == "load" else "",
        }
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder.file("local", "engines")
        self.path = os.path.join(self.folder, key + ".plan")
        self.record_path = os.path.join(self.folder, key + ".json")
        cache = "timing-{module}-{version}-{sm}.cache".format(**self.identity)
        self.cache_path = os.path.join(self.folder, cache)

    def exists(self) -> bool:
        """Whether the engine was built."""
        return os.path.isfile(self.record_path) and os.path.isfile(self.path)

    def record(self) -> dict[str, Any]:
        """What the engine was built with.

        Raises:
            BundleError: there is none; names what is different from the engines that are here.
        """
        if not self.exists():
            raise BundleError("there is no engine yet: run `build` first." + "".join(self._others()))
        with open(self.record_path, encoding="utf-8") as file:
            return dict(json.load(file))

    def _others(self) -> list[str]:
        lines = []
        for name in sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []:
            if name.endswith(".json"):
                with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                    other = json.load(file)["identity"]
                differs = [f"{k} {other[k]!r}, now {v!r}" for k, v in self.identity.items() if other.get(k) != v]
                lines.append(f"\n  the engine {name[:-5]} is for: " + "; ".join(differs))
        return lines

    def read(self) -> bytes:
        """The engine, checked to be the one that was built."""
        record = self.record()
        with open(self.path, "rb") as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise BundleError(f"{self.path} is damaged: run `build --force`")
        return content


def build(folder: Folder, options: Options, adapter: dict[str, Any], force: bool = False) -> Plan:
    """Build the engine if it is not there yet, in one step: a cut of power leaves none or a whole one.

    Raises:
        BundleError: TensorRT refuses the model; with its own messages and, for the known ones, what to do.
    """
    trt = trt_module.load(options.runtime)
    sm = f"{options.sm[:-1]}.{options.sm[-1]}" if options.sm else Cuda(options.library).sm()
    plan = Plan(folder, trt, sm, adapter)
    if plan.exists() and not force:
        return plan
    os.makedirs(plan.folder, exist_ok=True)
    sweep(plan.folder)
    start = time.time()
    content, notes = _build(trt, folder, options, plan, model_path(folder, adapter))
    write_atomically(plan.path, content)
    record = {
        "identity": plan.identity,
        "sha256": sha256_of(plan.path),
        "bytes": os.path.getsize(plan.path),
        "board": board(),
        "seconds": round(time.time() - start, 1),
        "options": {key: value for key, value in options._asdict().items() if value is not None},
        "notes": notes,
    }
    write_atomically(plan.record_path, json.dumps(record, indent=1).encode())
    return plan


def prune(folder: Folder) -> None:
    """Remove engines of mode "load" whose adapter is neither in use nor the one before: each has the model's size."""
    state = folder.state()
    kept = {one["sha256"] for one in [state["adapter"], *state["previous"][:1]]}
    place = folder.file("local", "engines")
    for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
        if not name.endswith(".json"):
            continue
        with open(os.path.join(place, name), encoding="utf-8") as file:
            identity = json.load(file)["identity"]
        if identity["model"] == folder.manifest["model"]["sha256"] and identity["adapter"] not in kept:
            for path in (name, name[: -len("json")] + "plan"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(place, path))


def model_path(folder: Folder, adapter: dict[str, Any]) -> str:
    """The ONNX model to build from; in mode "load" beside the vectors of the adapter, which are a file of it."""
    model = folder.manifest["model"]
    if folder.mode != "load" or adapter["name"] == folder.manifest["default"]:
        return folder.file(model["file"])
    place = folder.file("local", "build")
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    vectors = vectors_of(folder, adapter)
    for name in model["files"]:
        if name != model["vectors_file"]:
            _link(folder.file(name), os.path.join(place, name))
    write_atomically(
        os.path.join(place, model["vectors_file"]), b"".join(vectors[name].data for name in model["order"])
    )
    return os.path.join(place, model["file"])


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _build(trt: Any, folder: Folder, options: Options, plan: Plan, path: str) -> Any:
    log = logger(trt)
    log.messages.verbose = options.verbose
    log.messages.clear()
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    flags, notes = types_of(trt, config, folder.manifest)
    notes += _meant_for(trt, folder)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        errors = [f"{parser.get_error(index)}" for index in range(parser.num_errors)]
        hints = "".join(f"\n  -> {note}" for note in _meant_for(trt, folder))
        raise BundleError(f"{Refused('read', log, said=errors)}{hints}")
    choices = folder.manifest["build"]
    workspace = options.workspace_mib or choices["workspace_mib"]
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    level = choices["optimization_level"] if options.optimization_level is None else options.optimization_level
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = level
    elif options.optimization_level is not None:
        notes.append(f"TensorRT {trt.__version__} has no optimization levels: --optimization-level was not used")
    if not options.tf32 and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.sm and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(flag(trt, "ComputeCapability", f"SM{options.sm}"), 0)
    _set_profile(builder, config, choices["profiles"])
    if folder.mode == "refit":
        _mark(trt, network, config, list(folder.manifest["vectors"]))
    cached = not trt.__name__.startswith("tensorrt_rtx")  # deprecated there, and does nothing
    if cached:
        _read_cache(config, plan.cache_path)
    line = Line()
    try:
        with building(trt, config, line):
            content = builder.build_serialized_network(network, config)
    finally:
        line.clear()
        if cached:
            _write_cache(config, plan.cache_path)
    if content is None:
        raise Refused("build", log)
    return content, notes


def types_of(trt: Any, config: Any, manifest: dict[str, Any]) -> Any:
    """The flags of the network, and what the user should know about the types that the engine will compute in.

    The types of the ONNX model are the engine's where TensorRT is strongly typed (10 and newer).  Before that it
    chooses: a 16-bit or 8-bit type of the model then has to be allowed, and float32 may still be taken.
    """
    networks, model = trt.NetworkDefinitionCreationFlag, manifest["model"]
    flags = 0
    notes: list[str] = []
    if hasattr(networks, "EXPLICIT_BATCH"):
        flags |= 1 << int(networks.EXPLICIT_BATCH)
    weak = manifest["build"]["typing"] == "weak_fp16"
    wanted = [name for name, dtype in (("FP16", "float16"), ("BF16", "bfloat16")) if dtype in model["dtypes"]]
    if weak and "FP16" not in wanted:
        wanted.append("FP16")
    if model["quantized"]:
        wanted.append("INT8")
    if hasattr(networks, "STRONGLY_TYPED") and not weak:
        return flags | 1 << int(networks.STRONGLY_TYPED), notes
    for name in wanted:
        if not hasattr(trt.BuilderFlag, name):
            raise BundleError(
                f"this bundle leaves the choice of types to TensorRT, and TensorRT {trt.__version__} no longer has "
                f"{name} for that: export with dtype=torch.float16 and make the bundle again without weak_fp16"
            )
        config.set_flag(getattr(trt.BuilderFlag, name))
    if wanted:
        notes.append(f"TensorRT chooses types layer by layer among float32 and {', '.join(wanted)}: not each is 16 bit")
    return flags, notes


def _meant_for(trt: Any, folder: Folder) -> list[str]:
    """A hint if the bundle was made for another TensorRT than this one; it may fit all the same."""
    device = folder.manifest["device"]
    here = str(trt.__version__)
    if trt.__name__ != "tensorrt" or here.split(".")[:2] == device["tensorrt"].split(".")[:2]:
        return []
    return [
        f"the bundle was made for TensorRT {device['tensorrt']} (JetPack {device['jetpack']}), here is {here}: "
        "if it does not build, make one with the device's --jetpack"
    ]


def _set_profile(builder: Any, config: Any, profiles: dict[str, Any]) -> None:
    if not profiles:
        return
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in profiles.items():
        profile.set_shape(name, tuple(low), tuple(best), tuple(high))
    config.add_optimization_profile(profile)


def _mark(trt: Any, network: Any, config: Any, names: list[str]) -> None:
    if not hasattr(trt.BuilderFlag, "REFIT_INDIVIDUAL"):
        raise BundleError(
            f"TensorRT {trt.__version__} can't refit single weights (10.2 and newer can, JetPack 6.1 and newer): make "
            "the bundle from the same model with swap='input'"
        )
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if refused := [name for name in names if not network.mark_weights_refittable(name)]:
        raise BundleError(f"TensorRT finds no weights of these names in the model: {', '.join(refused[:10])}")


def _read_cache(config: Any, path: str) -> None:
    content = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            content = file.read()
    cache: Any | None = config.create_timing_cache(content)
    if cache is None and content:  # damaged: timings are measured again
        cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)


def _write_cache(config: Any, path: str) -> None:
    """Also of a build that failed: what was measured need not be measured again."""
    cache = config.get_timing_cache()
    content = cache.serialize() if cache is not None else None
    if content is not None:
        write_atomically(path, content)
