"""Bundles of a small adapted model, made once for a test session."""

import base64
import functools
import hashlib
import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import onnx
import tensorrt_double
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file

import onelora_compile as onelora
from onelora_compile.exporters import bundle, export_onnx
from onelora_compile.testing import fill_vectors

SHAPES = {"x": ((1, 16, 12), (2, 16, 12), (4, 16, 12))}
MODES = ("fold", "load", "input", "bank", "refit")
ORT = ("--runtime", "onnxruntime")  # what has no GPU runs


@functools.cache
def sources():
    """A folder with adapters a, b, new (of one base), other (of another), and the model in each mode."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model = onelora.adapt(zoo.TinyViT())
    for seed, name in enumerate(("a", "b", "new", "c")):
        onelora.save_adapter(fill_vectors(model, 0.3, seed=seed), folder / f"{name}.safetensors")
    x = torch.randn(2, 16, 12)
    for mode in MODES[:-1]:
        files = [folder / "a.safetensors", folder / "b.safetensors"] if mode == "bank" else []
        export_onnx(model, (x,), folder / f"{mode}.onnx", adapters=mode, dynamic_shapes=({0: "batch"},), bank=files)
    torch.manual_seed(1)
    onelora.save_adapter(fill_vectors(onelora.adapt(zoo.TinyViT()), 0.3), folder / "other.safetensors")
    return folder


@functools.cache
def _made(mode, jetpack):
    folder = sources()
    swaps = mode in ("load", "input", "refit")
    bundle(
        folder / ("input.onnx" if mode == "refit" else f"{mode}.onnx"),
        folder / f"{mode}-{jetpack}",
        jetpack=jetpack,
        adapters=[folder / "a.safetensors", folder / "b.safetensors"] if swaps else (),
        shapes=SHAPES,
        swap="refit" if mode == "refit" else "auto",
    )
    return folder / f"{mode}-{jetpack}"


def fresh(mode, place, jetpack="6.2"):
    """A copy of a bundle to work on."""
    Path(place).mkdir(exist_ok=True)
    return Path(shutil.copytree(_made(mode, jetpack), Path(place) / f"{mode}-{jetpack}"))


def device(folder, module="commands"):
    """A module of the bundle's own copy of the device's program."""
    for name in [name for name in sys.modules if name.split(".")[0] == "onelora_device"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        found = importlib.import_module(f"onelora_device.{module}")
        importlib.import_module("onelora_device.ort_run")
        return found
    finally:
        sys.path.remove(str(folder))


def run(folder, *args):
    """The command line of a bundle in this process: exit code."""
    return device(folder).main([*map(str, args)])


def plans(folder):
    return sorted((folder / "local" / "engines").glob("*.plan"))


def drive(folder, cudart, real, sources):
    """Everything that a user does on the device; returns the double."""
    trt = tensorrt_double.module(real)
    sys.modules["tensorrt"] = trt
    main = device(folder).main

    def call(*args, code=0):
        found = main(["--libcudart", str(cudart), *args])
        assert found == code, args

    mode = json.loads((folder / "manifest.json").read_text())["model"]["mode"]
    call("build")
    call("selftest")
    call("bench", "--runs", "3")
    call("bench", "--runs", "3", "--cuda-graph")
    if mode in ("input", "refit", "load"):
        call("update", str(sources / "new.safetensors"))
        call("selftest")
        call("use", "a")
        call("rollback")
        call("update", str(sources / "other.safetensors"), code=1)
    call("status")
    return trt


def call(folder, *args):
    """The command line of a bundle with ONNX Runtime, in this process: exit code."""
    return device(folder).main([*ORT, *map(str, args)])


def active(folder):
    """The name of the adapter in use."""
    return device(folder, "folder").Folder(str(folder)).state()["adapter"]["name"]


def exported(model, args, path, **options):
    export_onnx(model, args, path, **options)
    return path


def base_model():
    torch.manual_seed(0)
    return zoo.TinyViT()


def changed(path, out, tensors=None, **metadata):
    """A copy of an adapter file with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}
        known = file.metadata()
    save_file({**held, **(tensors or {})}, out, {**known, **metadata})
    return out


def for_runtime(mode, place, layout="triton"):
    """A bundle for a stock runtime, without and with an adapter that can be replaced."""
    swap = "refit" if mode == "refit" else "auto"
    source = sources() / ("input.onnx" if mode == "refit" else f"{mode}.onnx")
    adapters = [] if mode == "fold" else [sources() / "a.safetensors"]
    return bundle(source, place / "b", shapes=SHAPES, adapters=adapters, layout=layout, swap=swap).folder


def change_engines(folder, changed):
    """Change the model inside of every engine, as a fault of a release does."""
    for plan in plans(folder):
        found = json.loads(plan.read_text())
        model = onnx.load_from_string(base64.b64decode(found["model"]))
        changed(model)
        found["model"] = base64.b64encode(model.SerializeToString()).decode()
        plan.write_text(json.dumps(found))
        record = plan.with_suffix(".json")
        fields = json.loads(record.read_text())
        fields["sha256"] = hashlib.sha256(plan.read_bytes()).hexdigest()
        record.write_text(json.dumps(fields))
