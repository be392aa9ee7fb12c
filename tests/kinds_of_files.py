"""Files of every kind that this package reads or writes, and every function that writes one."""

import shutil

import onnx
import onnxruntime
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import bundle, convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors

X = torch.randn(2, 24)


def outputs(path):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


def copied_files(made, tmp_path):
    """A fixture: a copy of the folder of `made_files` for one test."""
    return shutil.copytree(made, tmp_path / "work")


def made_files(tmp_path_factory):
    """A fixture of a module: the folder.

    base.onnx of a foreign exporter with base.onnx.data, a model of two modes, two adapters and what each gives.
    """
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    torch.onnx.export(model, (X,), folder / "base.onnx", dynamo=True, external_data=True, verbose=False)
    held = onnx.load(folder / "base.onnx")
    onnx.save(held, folder / "base.onnx", save_as_external_data=True, location="base.onnx.data", size_threshold=0)
    onelora.adapt(model)
    for seed, name in enumerate("ab"):
        onelora.save_adapter(fill_vectors(model, 0.3, seed), folder / f"{name}.safetensors")
        torch.save(model(X).detach(), folder / f"{name}.pt")
    for mode in ("input", "load"):
        export_onnx(model, (X,), folder / f"{mode}.onnx", adapters=mode, progress=False)
    return folder


def writers(here):
    """Every function that reads files and writes one: (call with an output, the inputs it must not touch)."""
    a, b, base = here / "a.safetensors", here / "b.safetensors", here / "base.onnx"

    def bank(out):
        torch.manual_seed(0)
        loaded = onelora.load_adapter(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval(), a)
        export_onnx(loaded, (X,), out, adapters="bank", bank=[a], progress=False)

    return {
        "fold": (lambda out: fold_onnx(base, a, out, progress=False), [a, here / "base.onnx.data"]),
        "export": (bank, [a]),
        "convert": (lambda out: convert_adapter(a, out), [a]),
        "convert like": (lambda out: convert_adapter(a, out, like=here / "load.onnx"), [a]),
        "combine": (lambda out: onelora.combine({a: 0.7, b: -0.3}, out), [a, b]),
        "bundle": (
            lambda out: bundle(here / "input.onnx", out, adapters=[a], selftest=False, progress=False),
            [a, here / "input.onnx", here],
        ),
    }


def adapted():
    return onelora.adapt(nn.Sequential(nn.Linear(24, 32)))
