"""Models and engines that several tests of TensorRT build."""

import atexit
import copy
import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import build_engine, export_onnx
from onelora_compile.testing import fill_vectors

OPTIONS: dict[str, Any] = {"flavour": "rtx", "target": "sm_86", "progress": False}
RTX: dict[str, Any] = {**OPTIONS, "shapes": {"batch": (1, 4, 8)}}

TOKENS = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}
SHAPES = {"batch": (1, 2, 8), "tokens": (4, 9, 32)}


def dit():
    from architectures import ARCHITECTURES

    model, inputs = ARCHITECTURES["dit"]()
    return model, inputs


MODELS = {**{name: zoo.MODELS[name] for name in ("hf_vit", "bert", "gpt2", "llama")}, "dit": dit}


def dynamic(inputs):
    return {name: TOKENS.get(name, {0: "batch"}) for name in inputs}


def shapes_for(path):
    """Sizes of the dynamic dimensions that a model has."""
    dims = {size for value in ir.load(path).graph.inputs for size in map(str, value.shape or ())}
    return {name: sizes for name, sizes in SHAPES.items() if name in dims}


def exported(name, mode, dtype, folder, verify=False):
    """An adapted model of the zoo as ONNX, with a dynamic batch; and its vectors."""
    model, inputs = MODELS[name]()
    fill_vectors(onelora.adapt(model), 0.05)
    path = folder / f"{name}-{mode}.onnx"
    options: dict[str, Any] = {}
    if mode == "bank":
        onelora.save_adapter(model, folder / "one.safetensors")
        fill_vectors(model, 0.05, seed=7)
        onelora.save_adapter(model, folder / "two.safetensors")
        options["bank"] = [folder / "one.safetensors", folder / "two.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx(
            model,
            (),
            path,
            kwargs=inputs,
            adapters=mode,
            dtype=dtype,
            dynamic_shapes=dynamic(inputs),
            verify=verify,
            progress=False,
            **options,
        )
    return path, model


@functools.cache
def _folder():
    folder = tempfile.mkdtemp(prefix="onelora-engines-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def linear(folder, mode="fold", dtype=torch.float16, scale=0.3):
    """One adapted linear as ONNX with a dynamic batch, in `folder`; and the model."""
    source, model = _linear(mode, dtype, scale)
    for file in [*source.parent.glob(f"{source.name}*"), *source.parent.glob("*.safetensors")]:
        shutil.copy(file, folder)
    return folder / source.name, copy.deepcopy(model)


@functools.cache
def _linear(mode, dtype, scale):
    torch.manual_seed(0)
    model = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(64, 48))), scale)
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    path = folder / f"linear-{mode}.onnx"
    x = torch.randn(4, 64)
    options: dict[str, Any] = {}
    if mode == "bank":
        onelora.save_adapter(model, folder / "linear.safetensors")
        options["bank"] = [folder / "linear.safetensors"]
    dtype = None if dtype == torch.float32 else dtype
    options |= {"dynamic_shapes": ({0: "batch"},), "verify": False, "progress": False}
    export_onnx(model, (x,), path, adapters=mode, dtype=dtype, **options)
    return path, model


def build_modes(folder):
    """Engines of the linear, fold.engine, input.engine and bank.engine, for a GPU that need not be there."""
    for mode in ("fold", "input", "bank"):
        path, _ = linear(folder, mode)
        build_engine(path, folder / f"{mode}.engine", **RTX)
    return folder


def numbers(tensor, dtype):
    """A tensor as an array of the dtype that an engine stores."""
    return np.ascontiguousarray(tensor.detach().to(dtype).numpy())


class Sequential(nn.Sequential):
    def forward(self, input):
        return super().forward(input)


def linear_model():
    torch.manual_seed(0)
    return Sequential(nn.Linear(64, 48))
