"""Build the engine of a bundle on this device, and find it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from typing import Any, Sequence

from . import trt_module
from .adapters import vectors_of
from .core.build import Build, can_be_strong, can_refit, has_timings
from .core.cuda import Cuda
from .core.messages import Refused
from .core.progress import Earlier, Line
from .folder import BundleError, Folder, make_folder, sha256_of, sweep, write_atomically
from .options import Options


class Plan:
    """Where the engine of a bundle is on this device, and what it was built with.

    Args:
        folder: the bundle.
        trt: the module.
        sm: compute capability, "8.7".
        adapter: of the state; its vectors are in the engine in mode "load", elsewhere it does not matter.
        watch: inner values that are outputs of it too.
    """

    def __init__(self, folder: Folder, trt: Any, sm: str, adapter: dict[str, Any], watch: Sequence[str] = ()) -> None:
        self.watch = list(watch)
        self.identity: dict[str, Any] = {
            "module": str(trt.__name__),
            "version": str(trt.__version__),
            "sm": sm,
            "model": folder.manifest["model"]["sha256"],
            "adapter": adapter["sha256"] if folder.traits.rebuilds else "",
        }
        if watch:
            self.identity["watch"] = self.watch
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder.file("local", "engines")
        self.path = os.path.join(self.folder, key + ".plan")
        self.record_path = os.path.join(self.folder, key + ".json")
        cache = "timing-{module}-{version}-{sm}.cache".format(**self.identity)
        self.cache_path = os.path.join(self.folder, cache)
        self.shipped_path = folder.file("timing", cache)

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

    def earlier(self) -> Earlier | None:
        """The last build of this model here, with this or another adapter."""
        same = ("module", "version", "sm", "model")
        found = [one for one in self._records() if all(one["identity"].get(k) == self.identity[k] for k in same)]
        last = max(found, key=lambda one: float(one.get("built", 0)), default=None)
        return None if last is None else Earlier(last["seconds"], last.get("phases", ()))

    def _records(self) -> list[dict[str, Any]]:
        found = []
        for name in sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []:
            if name.endswith(".json"):
                with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                    found.append({"name": name[: -len(".json")], **json.load(file)})
        return found

    def _others(self) -> list[str]:
        lines = []
        for record in self._records():
            other = record["identity"]
            differs = [f"{k} {other[k]!r}, now {v!r}" for k, v in self.identity.items() if other.get(k) != v]
            lines.append(f"\n  the engine {record['name']} is for: " + "; ".join(differs))
        return lines

    def read(self) -> bytes:
        """The engine, checked to be the one that was built."""
        record = self.record()
        with open(self.path, "rb") as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise BundleError(f"{self.path} is damaged: run `build --force`")
        return content


def build(
    folder: Folder, options: Options, adapter: dict[str, Any], force: bool = False, watch: Sequence[str] = ()
) -> Plan:
    """Build the engine if it is not there yet, in one step: a cut of power leaves none or a whole one.

    With `watch`, one that has these inner values as outputs too.

    Raises:
        BundleError: TensorRT refuses the model; with its own messages and, for the known ones, what to do.
    """
    trt = trt_module.load(options.runtime)
    sm = f"{options.sm[:-1]}.{options.sm[-1]}" if options.sm else Cuda(options.library).sm()
    plan = Plan(folder, trt, sm, adapter, watch)
    if plan.exists() and not force:
        return plan
    make_folder(plan.folder)
    sweep(plan.folder)
    start = time.time()
    content, notes, phases = _build(trt, folder, options, plan, model_path(folder, adapter))
    write_atomically(plan.path, content)
    record = {
        "identity": plan.identity,
        "sha256": sha256_of(plan.path),
        "bytes": os.path.getsize(plan.path),
        "board": board(),
        "built": round(time.time()),
        "seconds": round(time.time() - start, 1),
        "phases": phases,
        "options": {key: value for key, value in options._asdict().items() if value is not None and key != "provider"},
        "notes": notes,
    }
    write_atomically(plan.record_path, json.dumps(record, indent=1).encode())
    return plan


def board() -> str:
    """The name of a Jetson board from its device tree; "" elsewhere."""
    try:
        with open("/proc/device-tree/model", "rb") as file:
            return file.read().rstrip(b"\0").decode("ascii", "replace")
    except OSError:
        return ""


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
    if not folder.traits.rebuilds or adapter["name"] == folder.manifest["default"]:
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
    strong, allowed, notes = types_of(trt, folder.manifest)
    build = Build(trt, trt_module.log(trt, options), strong)
    build.allow(allowed)
    hints = _meant_for(trt, folder)
    notes += hints
    try:
        build.parse(path)
    except Refused as refused:
        raise BundleError(str(refused) + "".join(f"\n  -> {hint}" for hint in hints)) from None
    build.watch(plan.watch)
    choices = folder.manifest["build"]
    build.workspace((options.workspace_mib or choices["workspace_mib"]) << 20)
    asked = options.optimization_level
    if not build.optimization_level(choices["optimization_level"] if asked is None else asked) and asked is not None:
        notes.append(f"TensorRT {trt.__version__} has no optimization levels: --optimization-level was not used")
    if not options.tf32 and hasattr(trt.BuilderFlag, "TF32"):
        build.config.clear_flag(trt.BuilderFlag.TF32)
    build.targets([f"SM{options.sm}"] if options.sm else [])
    if choices["profiles"]:
        build.profile(choices["profiles"])
    if folder.traits.refits:
        _mark(trt, build, list(folder.manifest["vectors"]))
    cached, line = has_timings(trt), Line(plan.earlier())
    if cached:
        notes += _use_timings(build, plan)
    try:
        with line:
            content = build.plan(line)
    finally:
        if cached and (timings := build.timings()) is not None:
            write_atomically(plan.cache_path, timings)
    return content, notes, line.phases


def _use_timings(build: Build, plan: Plan) -> list[str]:
    """This device's timing cache, or the one that came with the bundle; notes."""
    own = _content(plan.cache_path)
    content = own or _content(plan.shipped_path)
    if build.use_timings(content) or not content:
        return []
    whose = "kept here" if own else "of the bundle"
    return [f"the timing cache {whose} is not of this device: TensorRT has started a new one"]


def types_of(trt: Any, manifest: dict[str, Any]) -> tuple[bool, list[str], list[str]]:
    """Whether the network is strongly typed, the dtypes to allow if not, and what the user should know about them.

    The types of the ONNX model are the engine's where TensorRT is strongly typed (10 and newer).  Before that it
    chooses: a 16-bit or 8-bit type of the model then has to be allowed, and float32 may still be taken.
    """
    model, weak = manifest["model"], manifest["build"]["typing"] == "weak_fp16"
    if can_be_strong(trt) and not weak:
        return True, [], []
    wanted = [name for name, dtype in (("FP16", "float16"), ("BF16", "bfloat16")) if dtype in model["dtypes"]]
    if weak and "FP16" not in wanted:
        wanted.append("FP16")
    if model["quantized"]:
        wanted.append("INT8")
    if not wanted:
        return False, [], []
    if absent := [name for name in wanted if not hasattr(trt.BuilderFlag, name)]:
        raise BundleError(
            f"this bundle leaves the choice of types to TensorRT, and TensorRT {trt.__version__} no longer has "
            f"{absent[0]} for that: export with dtype=torch.float16 and make the bundle again without weak_fp16"
        )
    note = f"TensorRT chooses types layer by layer among float32 and {', '.join(wanted)}: not each is 16 bit"
    return False, wanted, [note]


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


def _mark(trt: Any, build: Build, names: list[str]) -> None:
    if not can_refit(trt):
        raise BundleError(
            f"TensorRT {trt.__version__} can't refit single weights (10.2 and newer can, JetPack 6.1 and newer): make "
            "the bundle from the same model with swap='input'"
        )
    if refused := build.refittable(names):
        raise BundleError(f"TensorRT finds no weights of these names in the model: {', '.join(refused[:10])}")


def _content(path: str) -> bytes:
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read()
