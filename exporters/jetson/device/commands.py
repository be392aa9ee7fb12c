"""The command line of a bundle."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from . import measure
from .adapters import BASE, read_adapter, read_bytes, vectors_of
from .deployed import Deployed, why_fixed
from .folder import BundleError, Folder, sweep, write_atomically
from .layers import find_start
from .options import PROVIDERS, RUNTIMES, Options
from .ort_providers import caches
from .ort_providers import prune as prune_caches
from .placed import misplaced, place, place_of
from .sequence import taken_before
from .signature import check_signature
from .tensors import TensorError, npy_bytes, read_npy

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 is success, 1 a message on standard error, 2 wrong usage."""
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.function(Folder(chosen.bundle), _options(chosen), chosen) or 0)
    except (BundleError, TensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="build_and_run.py", description=__doc__)
    parser.add_argument("--bundle", default=_HERE, help="folder of the bundle (default: where this script is)")
    parser.add_argument("--runtime", choices=RUNTIMES, default="tensorrt", help="default: tensorrt")
    parser.add_argument("--provider", choices=PROVIDERS, help="what ONNX Runtime runs the model on (default: cpu)")
    parser.add_argument("--libcudart", help="path of libcudart.so (default: found)")
    parser.add_argument("--verbose", action="store_true", help="show the runtime's own messages")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(function=function)
        return one

    one = add("build", _build, "build the engine on this device (minutes; the timing cache makes the next one faster)")
    one.add_argument("--force", action="store_true", help="also if there is one")
    _builder_options(one)
    one = add("selftest", _selftest, "compare the engine with the reference tensors of the bundle")
    one.add_argument("--tolerance", type=float, help="largest relative difference (default: the bundle's, by dtype)")
    one.add_argument("--layers", action="store_true", help="if it fails, build an engine that shows where it starts")
    _builder_options(one)
    one = add("bench", _bench, "measure latency, p50 and p99")
    one.add_argument("--runs", type=int, default=200)
    one.add_argument("--cuda-graph", action="store_true", help="launch the model as a CUDA graph")
    one = add("run", _run, "run the model on arrays")
    one.add_argument("inputs", nargs="+", metavar="NAME=FILE.npy")
    one.add_argument("-o", "--output", default=".", help="folder for NAME.npy of each output")
    one = add("use", _use, "put an adapter of this bundle, or one that was installed, in use")
    one.add_argument("adapter")
    _builder_options(one)
    one = add("update", _update, "install an adapter file and put it in use: checked, tried, then switched in one step")
    one.add_argument("file")
    one.add_argument("--sha256", help="what the file's SHA-256 must be")
    one.add_argument("--signature", help="its signature, for a bundle with a key (default: FILE.sig)")
    one.add_argument("--no-try", action="store_true", help="do not run the model first (no memory for a second engine)")
    _builder_options(one)
    one = add("rollback", _rollback, "go back to the adapter before")
    _builder_options(one)
    add("status", _status, "show device, engine and adapter, and check every file of the bundle")
    return parser


def _builder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workspace-mib", type=int, help="memory for one kernel while building")
    parser.add_argument("--optimization-level", type=int, choices=range(6), help="how long the builder searches")
    parser.add_argument("--no-tf32", action="store_true", help="float32 products in full precision")
    parser.add_argument("--sm", help="tensorrt_rtx only: build for this GPU, 86, on a machine without one")


def _options(chosen: argparse.Namespace) -> Options:
    if chosen.provider and chosen.runtime != "onnxruntime":
        raise BundleError(f"--provider {chosen.provider} is for --runtime onnxruntime, and this is {chosen.runtime}")
    return Options(
        runtime=chosen.runtime,
        workspace_mib=getattr(chosen, "workspace_mib", None),
        optimization_level=getattr(chosen, "optimization_level", None),
        tf32=not getattr(chosen, "no_tf32", False),
        sm=(getattr(chosen, "sm", None) or "").replace(".", "").replace("sm_", "") or None,
        library=chosen.libcudart,
        verbose=chosen.verbose,
        provider=chosen.provider or "cpu",
    )


def _build(folder: Folder, options: Options, chosen: argparse.Namespace) -> None:
    folder.check()
    with folder.lock():
        adapter = folder.state()["adapter"]
        _build_for(folder, options, adapter, chosen.force)
        _place(folder, options, adapter)


def _build_for(folder: Folder, options: Options, adapter: dict[str, Any], force: bool = False) -> None:
    if options.runtime == "onnxruntime":
        from .ort_run import prepare

        print("\n".join(prepare(folder, options, adapter, force)))
        return
    from .trt_build import build

    print(f"building with {options.runtime}, this takes seconds to many minutes the first time", flush=True)
    plan = build(folder, options, adapter, force)
    record = plan.record()
    for note in record["notes"]:
        print(f"note: {note}")
    print(f"engine {plan.path}: {record['bytes']:,} bytes, built in {record['seconds']} s")


def _selftest(folder: Folder, options: Options, chosen: argparse.Namespace) -> int:
    folder.check()
    model = Deployed(folder.path, options)
    checks = measure.selftest(model, chosen.tolerance)
    print(f"{model.engine.label}, mode {model.mode!r}")
    print(f"{'case':6} {'adapter':24} {'output':20} {'difference':>10} {'allowed':>8} {'effect':>8}")
    for check in checks:
        effect = "-" if check.effect == float("inf") else f"{check.effect:.1e}"
        print(
            f"{check.case:6} {check.adapter[:24]:24} {check.output[:20]:20} {check.relative:10.1e} "
            f"{check.allowed:8.0e} {effect:>8} {'passed' if check.passed else 'FAILED'}"
        )
    with_vectors = [check for check in checks if check.adapter.split(" ")[0] != BASE]
    if with_vectors and not any(check.tells for check in with_vectors):
        print("note: no adapter changes an output by more than what is allowed, so this can't tell it from the base")
    if not checks:
        print(f"note: the adapter in use, {model.adapter['name']!r}, has no reference tensors; compared was nothing")
        measure.smoke(model)
        return 0
    failed = [check for check in checks if not check.passed]
    for line in measure.suspects(model, checks) if failed else []:
        print(line)
    for line in find_start(model) if failed and chosen.layers else []:
        print(line)
    print("selftest FAILED" if failed else "selftest passed")
    return 1 if failed else 0


def _bench(folder: Folder, options: Options, chosen: argparse.Namespace) -> None:
    if chosen.runs < 1:
        raise BundleError("--runs must be at least 1")
    model = Deployed(folder.path, options)
    print(f"{model.engine.label}, adapter {model.adapter['name']!r}, {chosen.runs} runs")
    for what, one in measure.bench(model, chosen.runs, chosen.cuda_graph).items():
        print(f"{what}: p50 {one.p50:.3f} ms, p99 {one.p99:.3f} ms, mean {one.mean:.3f} ms")


def _run(folder: Folder, options: Options, chosen: argparse.Namespace) -> None:
    inputs, read = {}, set()
    for one in chosen.inputs:
        name, found, path = one.partition("=")
        if not found:
            raise BundleError(f"{one!r} is not of the form NAME=FILE.npy")
        inputs[name] = read_npy(path)
        read.add(os.path.realpath(path))
    outputs = Deployed(folder.path, options).run(inputs)
    files: dict[str, str] = {}  # path -> output
    for name in outputs:
        path = os.path.join(chosen.output, name.replace("/", "_") + ".npy")
        if os.path.realpath(path) in read or path in files:
            other = f"output {files[path]!r}" if path in files else "an input"
            raise BundleError(f"output {name!r} would be written over {other}, to {path}; nothing was written")
        files[path] = name
    for path, name in files.items():
        value = outputs[name]
        write_atomically(os.path.abspath(path), npy_bytes(value))
        print(f"{path}: {value.dtype} {list(value.shape)}")


def _say(text: str) -> None:
    """Print what has been done; standard output on a full disk does not undo it, so it is no failure."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _use(folder: Folder, options: Options, chosen: argparse.Namespace) -> None:
    _refuse_fixed(folder)
    with folder.lock():
        adapter = folder.find(chosen.adapter)
        if folder.traits.takes_files:
            vectors_of(folder, adapter)
        _rebuild(folder, options, adapter)
        _place(folder, options, adapter)
        _activate(folder, adapter)
    _say(f"in use: {adapter['name']}")


def _update(folder: Folder, options: Options, chosen: argparse.Namespace) -> None:
    _refuse_fixed(folder)
    if folder.traits.feeds_ids:
        raise BundleError("a bank holds its adapters in the model: one more is a new bundle; `use` chooses among them")
    with folder.lock():
        content = read_bytes(chosen.file)
        sequence = check_signature(folder, chosen.file, content, chosen.signature)
        known = taken_before(folder, chosen.file, content, sequence)
        read_adapter(chosen.file, folder, chosen.sha256)
        if known:
            _say(f"there already: {chosen.file}; nothing changed, in use: {folder.state()['adapter']['name']}")
            return
        sweep(folder.file("local", "adapters"))
        adapter = folder.install(chosen.file, content, sequence)
        vectors_of(folder, adapter)  # what was written, not what was read
        _rebuild(folder, options, adapter)
        if not chosen.no_try:
            measure.smoke(Deployed(folder.path, options, adapter["name"]))
        _place(folder, options, adapter, check=not chosen.no_try)
        _activate(folder, adapter, sequence)
    _say(f"in use: {adapter['name']}, SHA-256 {adapter['sha256']}; `rollback` goes back")


def _rollback(folder: Folder, options: Options, chosen: argparse.Namespace) -> None:
    _refuse_fixed(folder)
    with folder.lock():
        adapter = folder.rollback()
        if folder.traits.takes_files:
            vectors_of(folder, adapter)
        _rebuild(folder, options, adapter)
        _place(folder, options, adapter)
        folder.undo()
    _say(f"in use: {adapter['name']}")


def _rebuild(folder: Folder, options: Options, adapter: dict[str, Any]) -> None:
    """Where an adapter is part of the engine, the one in use stays until the other one is there."""
    if options.engine_each(folder.traits):
        _build_for(folder, options, adapter)


def _place(folder: Folder, options: Options, adapter: dict[str, Any], check: bool = True) -> None:
    """Before the state says that an adapter is in use, a stock runtime finds it in its engine."""
    if path := place(folder, options, adapter, check):
        _say(f"placed: {path}")
    elif place_of(folder):
        _say(f"note: {place_of(folder)} is as it was: it is for TensorRT, and this is {options.runtime}")


def _activate(folder: Folder, adapter: dict[str, Any], sequence: int | None = None) -> None:
    folder.activate(adapter, sequence)
    with contextlib.suppress(OSError):  # the adapter is in use by now; the next command removes what is left
        folder.prune()
        prune_caches(folder)
        if folder.traits.rebuilds:
            from .trt_build import prune

            prune(folder)


def _refuse_fixed(folder: Folder) -> None:
    if folder.traits.fixed:
        raise BundleError(why_fixed(folder))


def _status(folder: Folder, options: Options, chosen: argparse.Namespace) -> int:
    manifest = folder.manifest
    device, state = manifest["device"], folder.state()
    print(f"bundle    {folder.path}, made by {manifest['producer']}")
    print(f"for       JetPack {device['jetpack']}: TensorRT {device['tensorrt']}, SM {', '.join(device['sm'])}")
    print(f"model     {manifest['model']['file']}, mode {folder.mode!r}, {', '.join(manifest['model']['dtypes'])}")
    print(
        f"adapter   {state['adapter']['name']}"
        + (f", {state['adapter']['sha256'][:16]}" if state["adapter"]["sha256"] else "")
    )
    print(f"before    {', '.join(one['name'] for one in state['previous']) or 'none'}")
    print(f"packed    {', '.join(folder.packed()) or 'none'}")
    print(f"installed {', '.join(folder.installed()) or 'none'}")
    if manifest.get("update_key"):
        print(f"sequence  {state['taken']['sequence'] if state['taken'] else 'none: any signed adapter is taken'}")
    engines = folder.file("local", "engines")
    plans = [name for name in sorted(os.listdir(engines)) if name.endswith(".plan")] if os.path.isdir(engines) else []
    plans += [os.path.basename(path) for path in caches(folder)]
    print(f"engines   {', '.join(plans) or ('none: run build' if options.builds else 'none, and none are needed')}")
    wrong = folder.damaged()
    for line in wrong:
        print(f"damaged   {line}")
    print("files     " + ("DAMAGED" if wrong else f"{len(manifest['files'])}, all as they were packed"))
    astray = misplaced(folder) if place_of(folder) else ""
    if place_of(folder):
        print(f"placed    {place_of(folder)}: {astray or 'with the adapter in use'}")
    return 1 if wrong or astray else 0
