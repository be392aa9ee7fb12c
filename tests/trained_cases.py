"""Adapters that train heads and norms besides vectors, and their models as ONNX files; for several tests."""

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx

# What an adapter trains besides vectors; "dropped" is a head whose bias of zeros exporters leave out.
VARIANTS: dict[str, dict[str, Any]] = {
    "vectors": {},
    "head": {"modules_to_save": ["classifier"]},
    "norms": {"train_norms": True},
    "both": {"modules_to_save": ["classifier"], "train_norms": True},
    "dropped": {"modules_to_save": ["classifier"]},
}
MODES = ("base", "fold", "load", "input", "bank")


class Pooled(nn.Module):
    """Two norms that look alike, and a head on [batch, features]: one Gemm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.b = nn.Linear(16, 16)
        self.last: nn.Module = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 3)

    def tokens(self, x):
        return self.last(self.b(torch.relu(self.norm(self.a(x)))))

    def forward(self, x):
        return self.classifier(self.tokens(x).mean(1))


class Tokens(Pooled):
    """A head on [batch, tokens, features]: a MatMul and an Add; a norm without a shift."""

    def __init__(self):
        super().__init__()
        self.last = nn.RMSNorm(16)

    def forward(self, x):
        return self.classifier(self.tokens(x))


class Images(nn.Module):
    """Statistics that move, norms over channels, a square head with one more linear in it."""

    def __init__(self):
        super().__init__()
        self.conv, self.batch_norm, self.group_norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.a = nn.Linear(8, 8)
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, x):
        x = self.group_norm(torch.relu(self.batch_norm(self.conv(x)) + x[:, :1, 1:-1, 1:-1]))
        return self.classifier(torch.relu(self.a(x.mean((2, 3)))))


MODELS = {"pooled": Pooled, "tokens": Tokens, "images": Images}


def inputs(name):
    torch.manual_seed(5)
    return torch.randn(2, 3, 9, 9) if name == "images" else torch.randn(2, 5, 8)


def base_of(name, variant):
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    if variant == "dropped":
        for module in model.classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    if name == "images":
        with torch.no_grad():
            for value in (model.batch_norm.weight, model.batch_norm.running_mean, model.batch_norm.running_var):
                value.uniform_(0.5, 1.5)
    return model


def trained(name, variant, seed):
    """An adapted model after some training."""
    config: dict[str, Any] = {"modules_to_save": [], **VARIANTS[variant]}
    if name == "images" and config["modules_to_save"]:
        config["modules_to_save"] = ["classifier.0", "classifier.2"]
    model = onelora.adapt(base_of(name, variant), onelora.OneLoRAConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "images":
            model.batch_norm.running_mean.normal_()
            model.batch_norm.running_var.uniform_(0.5, 2)
    return model.eval()


@functools.cache
def _root():
    folder = tempfile.mkdtemp(prefix="onelora-trained-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


@functools.cache
def adapters(name, variant):
    """A folder with `a.safetensors` and `b.safetensors`."""
    folder = Path(tempfile.mkdtemp(dir=_root()))
    for seed, adapter in enumerate("ab", 1):
        onelora.save_adapter(trained(name, variant, seed), folder / f"{adapter}.safetensors")
    return folder


def expected(name, variant, adapter, x):
    """What PyTorch computes; None is the base."""
    model = base_of(name, variant)
    if adapter is not None:
        onelora.load_adapter(model, adapters(name, variant) / f"{adapter}.safetensors")
    with torch.no_grad():
        return model.eval()(x).numpy()


@functools.cache
def exported(name, variant, mode, dtype=None):
    """The model with adapter a, or the base, as an ONNX file with a dynamic batch; not to be changed."""
    folder = Path(tempfile.mkdtemp(dir=_root()))
    files = adapters(name, variant)
    model = base_of(name, variant)
    if mode != "base":
        onelora.load_adapter(model, files / "a.safetensors")
    export_onnx(
        copy.deepcopy(model),
        (inputs(name),),
        folder / "m.onnx",
        adapters="fold" if mode == "base" else mode,
        bank=[files / "a.safetensors", files / "b.safetensors"] if mode == "bank" else (),
        dynamic_shapes={"x": {0: "batch"}},
        dtype=dtype,
        progress=False,
    )
    return folder / "m.onnx"
