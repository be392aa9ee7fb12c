"""A base as ONNX with an adapter of it, for tests of the files around fold_onnx."""

import copy
import functools
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors

CHILDREN = Path(__file__).with_name("fold_children.py")


@functools.cache
def made(external, sizes):
    """The input, what base and adapted model compute of it, and the bytes of their files by name."""
    torch.manual_seed(0)
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    base, x = nn.Sequential(*layers), torch.randn(3, sizes[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        export_onnx(base, (x,), folder / "base" / "m.onnx", external_data=external, progress=False)
        model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.1)
        onelora.save_adapter(model, folder / "a.safetensors")
        files = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    with torch.no_grad():
        return x, base(x).numpy(), model(x).numpy(), files


class Project:
    """A base as ONNX, an adapter of it, and what base and adapted model compute."""

    def __init__(self, folder, external, sizes=(40, 60, 50, 30)):
        self.x, self.old, self.new, files = made(external, sizes)
        self.folder, self.adapter = folder / "base", folder / "a.safetensors"
        self.base = self.folder / "m.onnx"
        self.folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def output(self, path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: self.x.numpy()})[0]

    def files(self, folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "error.txt"}

    def children(self, folders, out, fault, amount):
        command = [CHILDREN, self.base, self.adapter, out, folders, fault, amount]
        subprocess.run([sys.executable, *map(str, command)], check=True)


def close(actual, expected):
    return np.allclose(actual, expected, rtol=1e-4, atol=1e-5)
