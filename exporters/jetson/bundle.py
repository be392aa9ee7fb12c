"""A folder for a Jetson: the model, adapters, and a script that builds, tests, runs and updates it there.

On the device nothing of this package is needed, only what JetPack ships (the room `device`).  Engines are built there:
one built elsewhere does not load.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onelora_compile.errors import ConfigError, ExportError, StateError, require
from onelora_compile.exporters.jetson import device
from onelora_compile.exporters.jetson.bundle_manifest import (
    adapter_entries,
    check_free,
    manifest_of,
    tolerances,
    types_text,
)
from onelora_compile.exporters.jetson.bundle_readme import readme
from onelora_compile.exporters.jetson.bundle_report import BundleReport
from onelora_compile.exporters.jetson.check_ranges import check_ranges
from onelora_compile.exporters.jetson.container import IGNORED, dockerfile
from onelora_compile.exporters.jetson.device.adapters import BUILT
from onelora_compile.exporters.jetson.device.deployed import Deployed
from onelora_compile.exporters.jetson.device.folder import BundleError, Folder, name_of, sha256_of
from onelora_compile.exporters.jetson.device.measure import Check, selftest
from onelora_compile.exporters.jetson.device.options import Options
from onelora_compile.exporters.jetson.fit_model import Fitted, fit
from onelora_compile.exporters.jetson.layouts import Layout, layout_of
from onelora_compile.exporters.jetson.polygraphy_script import polygraphy_script
from onelora_compile.exporters.jetson.reference_outputs import (
    Cases,
    default_swaps,
    reference_cases,
    reference_inputs,
    reference_runner,
)
from onelora_compile.exporters.jetson.releases import JetPack, jetpack_of
from onelora_compile.exporters.jetson.shape_ranges import Shapes, profile_of
from onelora_compile.exporters.jetson.signing import public_key_of
from onelora_compile.exporters.jetson.timing_caches import check_timings, write_timings
from onelora_compile.exporters.jetson.trtexec import trtexec_script
from onelora_compile.exporters.onnx_file.save import save_model
from onelora_compile.exporters.onnx_file.trained import other_values
from onelora_compile.exporters.onnx_runtime.convert_adapter import adapter_of
from onelora_compile.exporters.onnx_runtime.runner import OnnxRunner
from onelora_compile.file_names import as_path, as_paths, check_there
from onelora_compile.progress import steps
from onelora_compile.weights.adapter_file import read_adapter, write_adapter
from onelora_compile.weights.atomic_write import refuse_overwriting, replacing_folder

PathLike = str | os.PathLike[str]

# Largest difference over the largest magnitude of an output in ONNX Runtime here, where only the form changed.
_HERE = {"float32": 1e-4, "float16": 1e-2}
_SCRIPTS = ("build_and_run.py", "polygraphy_data.py")  # beside the program's own folder


def bundle(
    onnx: PathLike,
    out: PathLike,
    *,
    jetpack: str = "6.2",
    adapters: Sequence[PathLike] = (),
    shapes: Shapes | None = None,
    inputs: Mapping[str, Any] | None = None,
    swap: str = "auto",
    layout: str = "plain",
    verify_key: PathLike | None = None,
    timing_caches: Sequence[PathLike] = (),
    weak_fp16: bool = False,
    workspace_mib: int = 512,
    optimization_level: int = 3,
    selftest: bool = True,
    progress: bool = True,
) -> BundleReport:
    """Write a folder that builds and runs a model on a Jetson, and takes new adapters there.

    Args:
        onnx: a model of `export_onnx` or `fold_onnx`. Its mode decides how the device takes another adapter:
            "fold": not at all. "load": the engine is built again there, at no cost at run time. "input": at once.
            "bank": one of those in the model, for each row of a batch.
        out: the folder to write; a bundle that is there is replaced, if nothing was added to it.
        jetpack: of the device: "5.1", "6.0", "6.1", "6.2", "7.0", "7.1", "7.2".
        adapters: adapter files to pack, for "load" and "input"; more can follow as single files.
        shapes: smallest, best and largest shape of each dynamic input: `{"x": ((1, 3), (4, 3), (8, 3))}`.
        inputs: arrays by name for the self-test; None draws random ones.
        swap: "refit" makes the vectors of a model of mode "input" constants of the engine that are refitted there.
        layout: "triton", "deepstream" or "isaac-ros": the file that this runtime takes is written too, and the device
            puts each new engine where it looks for one; for modes "fold", "load" and, with `swap`, "refit". "plain":
            the bundle's own program alone.
        verify_key: a public key, ed25519 in PEM: the device takes adapter files alone that `sign_adapter` signed with
            its private one. For modes that take files, from JetPack 6.0 on.
        timing_caches: files `local/engines/timing-….cache` of devices that built a bundle: the first build on others of
            the same GPU and TensorRT is as fast as a later one.
        weak_fp16: let TensorRT choose float16 for a float32 model; for TensorRT 8 and 10.
        workspace_mib: memory for one kernel while the engine is built, in MiB.
        optimization_level: 0 to 5, how long the builder searches for kernels.
        selftest: store reference tensors, and check the finished bundle in ONNX Runtime.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ConfigError: an argument that can't be meant, or a dynamic input without shapes.
        ExportError: that TensorRT would not take the model, the bundle computes something else than the model, or a
            value that the model has in float16 overflows on the reference inputs.
        StateError: adapters for a model that can't take any; `out` is something else, or is used on this machine.
        AdapterFileError: an adapter that is damaged or of another model.
        BaseMismatchError: an adapter that was trained on another base.
        OSError: the folder can't be written; nothing is left then.
    """
    start, target = time.perf_counter(), jetpack_of(jetpack)
    source, out, adapters = as_path(onnx, "onnx"), as_path(out, "out"), as_paths(adapters, "adapters")
    timings = as_paths(timing_caches, "timing_caches")
    check_timings(timings)
    _check_choices(target, weak_fp16, workspace_mib, optimization_level)
    refuse_overwriting(out, [source, *adapters, *timings])
    check_free(out)
    with steps(f"bundle {out.name}", 4, progress) as step, replacing_folder(out) as folder:
        step("fit the model")
        fitted = fit(source, target, swap, weak_fp16)
        profile = profile_of(fitted.model, shapes)
        stock = layout_of(layout, fitted, target, profile)
        key = "" if verify_key is None else public_key_of(verify_key, fitted, target)
        types = types_text(fitted, target, weak_fp16)
        files = _adapter_files(fitted, adapters, source)
        built = _template(fitted) if fitted.traits.refits else {}
        runner = reference_runner(source) if selftest else None
        cases = reference_inputs(runner, profile, inputs) if runner is not None else {}
        values = check_ranges(fitted, cases, files, weak_fp16)
        step("write")
        apart = tuple(fitted.values) if fitted.traits.takes_files and not fitted.traits.feeds_vectors else ()
        written = save_model(fitted.model, folder / "model.onnx", apart=apart)
        _write_adapters(folder, fitted, files)
        step("reference")
        reference = _write_reference(folder, runner, cases, files, built) if runner is not None else []
        manifest = manifest_of(fitted, target, source, written, reference)
        manifest["model"]["values"] = values
        manifest["build"] = {
            "typing": "weak_fp16" if weak_fp16 else "model",
            "workspace_mib": workspace_mib,
            "optimization_level": optimization_level,
            "profiles": profile,
        }
        manifest["tolerance"] = tolerances(fitted, weak_fp16)
        manifest["adapters"], manifest["default"] = adapter_entries(folder, fitted, files)
        manifest["update_key"] = key
        _write_layout(folder, manifest, stock)
        write_timings(folder, timings)
        _write_programs(folder, manifest, target, types)
        step("check")
        checks = _checked(folder, fitted) if selftest else []
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return BundleReport(
        folder=out,
        bytes=size,
        jetpack=target.version,
        tensorrt=target.tensorrt,
        mode=fitted.mode,
        adapters=[entry["name"] for entry in manifest["adapters"]],
        opset_version=fitted.model.opset_imports[""],
        types=types,
        notes=fitted.notes,
        checks=checks,
        seconds=time.perf_counter() - start,
    )


def _check_choices(jetpack: JetPack, weak_fp16: bool, workspace_mib: int, optimization_level: int) -> None:
    if weak_fp16 and not jetpack.weak_typing:
        raise ConfigError(f"weak_fp16: TensorRT {jetpack.tensorrt} takes the types of the model: export in float16")
    if workspace_mib < 1 or optimization_level not in range(6):
        raise ConfigError("workspace_mib must be at least 1, optimization_level 0 to 5")


def _adapter_files(fitted: Fitted, adapters: Sequence[Path], source: Path) -> dict[str, Path]:
    """The adapter files to pack by name, each checked against the model."""
    if adapters and not fitted.traits.takes_files:
        raise StateError(
            f"adapters were given, but {source} can't take any (mode {fitted.mode!r}): export it with adapters='input' "
            "or 'load', or put one into its weights with fold_onnx and bundle that"
        )
    found: dict[str, Path] = {}
    for path in adapters:
        check_there(path)
        file = read_adapter(path)
        fitted.metadata.check_fits(file, str(source))
        try:
            name = name_of(str(path))
        except BundleError as error:
            raise ConfigError(str(error)) from None
        if name in found or name in ("base", "default"):
            raise ConfigError(f"{path}: an adapter's name is its file's, and {name!r} is taken: rename the file")
        found[name] = path
    return found


def _template(fitted: Fitted) -> dict[str, np.ndarray]:
    """Distinct values that are not zero, for the engine to be built with: equal constants might be merged."""
    metadata, generator = fitted.metadata, np.random.default_rng(0)
    built = other_values(metadata.vectors, metadata.fingerprints, fitted.values, generator)
    ir = require("onnx_ir", "onnx", "make a bundle")
    for name, value in built.items():
        fitted.model.graph.initializers[name].const_value = ir.tensor(value, name=name)
    return built


def _write_reference(
    folder: Path, runner: OnnxRunner, cases: Cases, files: Mapping[str, Path], built: Mapping[str, np.ndarray]
) -> list[dict[str, str]]:
    """What the original computes with every adapter; the manifest's list of the files."""
    written, swaps = [], default_swaps(runner, files) | ({BUILT: built} if built else {})
    (folder / "reference").mkdir()
    for case, content in reference_cases(runner, cases, swaps).items():
        name = f"reference/{case}.safetensors"
        (folder / name).write_bytes(content)
        written.append({"case": case, "file": name})
    return written


def _write_adapters(folder: Path, fitted: Fitted, files: Mapping[str, Path]) -> None:
    if not fitted.values:
        return
    (folder / "adapters").mkdir()
    for name, path in files.items():
        shutil.copyfile(path, folder / "adapters" / f"{name}.safetensors")
    default = adapter_of(fitted.metadata, fitted.values, fitted.metadata.producer)
    own = folder / "adapters" / "default.safetensors"
    write_adapter(default, own)
    own.chmod(0o644)


def _write_layout(folder: Path, manifest: dict[str, Any], layout: Layout | None) -> None:
    if layout is None:
        return
    manifest["layout"] = {"name": layout.name, "plan": layout.plan, "file": layout.file}
    for name in (layout.plan, layout.file):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / layout.file).write_text(layout.text, encoding="utf-8")


def _write_programs(folder: Path, manifest: dict[str, Any], jetpack: JetPack, types: str) -> None:
    """The scripts, the README, and, last, the manifest with the hash of everything else."""
    source = Path(device.__file__).parent
    for file in sorted(source.rglob("*.py")):
        place = folder if file.name in _SCRIPTS else folder / "onelora_device"
        (target := place / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (folder / "Dockerfile").write_text(dockerfile(jetpack, manifest), encoding="utf-8")
    (folder / ".dockerignore").write_text(IGNORED, encoding="utf-8")
    (folder / "trtexec.sh").write_text(trtexec_script(jetpack, manifest), encoding="utf-8")
    scripts = ["trtexec.sh", *_SCRIPTS]
    if manifest["reference"]:
        (folder / "polygraphy.sh").write_text(polygraphy_script(folder, jetpack, manifest), encoding="utf-8")
        scripts.append("polygraphy.sh")
    (folder / "README.md").write_text(readme(manifest, types), encoding="utf-8")
    for name in scripts:
        (folder / name).chmod(0o755)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(str(path))}
        for path in found
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _checked(folder: Path, fitted: Fitted) -> list[Check]:
    """What the device will do, here in ONNX Runtime: the same steps by the same program on the same files."""
    tolerance = _HERE["float16" if "float16" in fitted.dtypes else "float32"]
    try:
        if wrong := Folder(str(folder)).damaged():
            raise ExportError(f"files changed while the bundle was made: {wrong}")
        checks = selftest(Deployed(str(folder), Options(runtime="onnxruntime")), tolerance)
    except BundleError as error:
        raise ExportError(f"the bundle can't be run: {error}") from error
    if failed := [check for check in checks if not check.passed]:
        one = failed[0]
        raise ExportError(
            f"the model in the bundle differs from the original: output {one.output!r} with adapter {one.adapter!r} by "
            f"{one.relative:.1e} relative, {one.allowed:.0e} is allowed; nothing was written"
        )
    return checks
