"""Everything that writes files, as one call each; and whether a file gives the function of the right vectors."""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from faults import failing
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError, OneLoRAError
from onelora_compile.exporters import OnnxRunner, bundle, convert_adapter, export_onnx, fold_onnx
from onelora_compile.exporters.jetson.device import commands
from onelora_compile.exporters.jetson.device.deployed import Deployed
from onelora_compile.exporters.jetson.device.folder import BundleError, Folder
from onelora_compile.exporters.jetson.device.options import Options
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.exporters.tensorrt.write_engine import write_engine
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.adapter_content import digest, float32

X = torch.linspace(-1, 1, 60).reshape(3, 20)
SEEDS = {"a.safetensors": 1, "b.safetensors": 2}  # of the vectors in each adapter; 0 is the base
ORT = ("--runtime", "onnxruntime")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12)).eval()


def adapted(seed):
    return fill_vectors(onelora.adapt(network()), 0.3 if seed else 0.0, seed)


@functools.cache
def expected(seed):
    """The function with the vectors of a seed, in float64, of X."""
    model = adapted(seed)
    onelora.merge(model)
    return model.double()(X.double()).detach().numpy()


@functools.cache
def source():
    """A foreign model and its twin with one file of weights, models of two modes, two adapters, and a bundle."""
    folder = Path(tempfile.mkdtemp())
    torch.onnx.export(network(), (X,), folder / "m.onnx", dynamo=True, verbose=False)
    held = onnx.load(folder / "m.onnx")
    onnx.save(held, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    shutil.copy(folder / "m.onnx", folder / "twin.onnx")
    for name, seed in SEEDS.items():
        onelora.save_adapter(adapted(seed), folder / name)
    for mode in ("load", "input"):
        export_onnx(adapted(1), (X,), folder / f"{mode}.onnx", adapters=mode, progress=False)
    packed = [folder / name for name in SEEDS]
    bundle(folder / "input.onnx", folder / "device", adapters=packed, selftest=False, progress=False)
    return folder


def device(here, *arguments):
    if commands.main(["--bundle", str(here / "device"), *ORT, *map(str, arguments)]):
        raise BundleError("exit code 1")


def saved(here, out, name):
    onelora.save_adapter(adapted(SEEDS[name]), here / out)


def folded(here, out, name, base="m.onnx"):
    fold_onnx(here / base, here / name, here / out, progress=False)


def exported(here, out, name, mode="fold", external=True):
    options = {"adapters": mode, "external_data": external, "verify": False, "progress": False}
    export_onnx(adapted(SEEDS[name]), (X,), here / out, **options)


def converted(here, out, name):
    convert_adapter(here / name, here / out, like=here / "load.onnx")


def combined(here, out, name):
    onelora.combine({here / one: float(one == name) for one in SEEDS}, here / out)


def bundled(here, out, name):
    bundle(here / "load.onnx", here / out, adapters=[here / name], selftest=False, progress=False)


def updated(here, out, name):
    device(here, "update", here / name, "--no-try")


def used(here, out, name):
    device(here, "use", name.removesuffix(".safetensors"))


def built(here, out, name):
    file = onelora.read_adapter(here / name)
    sha = digest({one: float32(value) for one, value in file.tensors.items()})
    about = Manifest("rtx", "1", "input", "m.onnx", "", "", adapter_sha256=sha, initial=f"{out}.safetensors")
    write_engine(here / out, name.encode() * 1000, about, file)


def function(path):
    """What is stored at a path, as the outputs that it gives of X."""
    if path.suffix == ".onnx":
        return OnnxRunner(path).run({"input": X.numpy()})[0] if path.exists() else None
    if path.is_dir():
        assert Folder(str(path)).damaged() == []
        packed = [name for name in Folder(str(path)).packed() if name not in ("default", "base")]
        model = Deployed(str(path), Options(runtime="onnxruntime"), packed[0] if len(packed) == 1 else None)
        return model.run({"input": X.numpy()})["output"].numpy()
    if path.suffix == ".engine":
        about = Manifest.read(path)
        try:
            about.check_file(path)
            about.initial_adapter(path)
        except ExportError:
            return None
        path = path.with_name(about.initial)
    if path.suffix != ".safetensors":
        path = convert_adapter(path, path.parents[1] / "read.safetensors", like=path.parent / "load.onnx")
    return onelora.load_adapter(network(), path)(X).detach().numpy()


def is_function(path, seed):
    found = function(path)
    return found is not None and np.allclose(found, expected(seed), rtol=1e-5, atol=1e-5)


WRITERS: dict[str, tuple[Callable[..., None], str]] = {
    "save": (saved, "s.safetensors"),
    "fold": (folded, "out.onnx"),
    "fold into a file of mode input": (functools.partial(folded, base="input.onnx"), "out.onnx"),
    "export": (exported, "out.onnx"),
    "export one file": (functools.partial(exported, external=False), "out.onnx"),
    "export load": (functools.partial(exported, mode="load"), "out.onnx"),
    "export input": (functools.partial(exported, mode="input"), "out.onnx"),
    "convert for ONNX Runtime": (converted, "c.onnx_adapter"),
    "convert to raw": (converted, "c.vectors"),
    "convert to safetensors": (converted, "c.safetensors"),
    "combine": (combined, "mix.safetensors"),
    "engine": (built, "m.engine"),
    "bundle": (bundled, "bundle"),
    "update": (updated, "device"),
    "use": (used, "device"),
}


def attempt(here, write, out, name, fault):
    """None if it was done; else the error."""
    with failing(here, fault):
        try:
            write(here, out, name)
        except (OneLoRAError, BundleError, OSError) as error:
            return error
    return None


def refused(path):
    """Whether this is an engine that is known to be mixed: three files can't get their names in one step."""
    return path.suffix == ".engine" and function(path) is None


def changes(old, new, fault, error, out):
    """Paths with another content that must not have it; what was written may, and begins the names of its parts."""
    written = (out[:200],) if error is None or fault.gone or out == "device" else ()
    left = (".",) if fault.leaves else ()
    changed = {path for path in old.keys() | new.keys() if old.get(path, 0) != new.get(path, 0)}
    return {path for path in changed if not path.startswith((*written, *left))}
