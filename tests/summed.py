"""A small base and adapters of it, for tests of their sums."""

import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

LAYERS = ("0", "2", "4")


def base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def adapter(path, layers=LAYERS, seed=1, scale=0.3, of=None, **config):
    """Save an adapter with random vectors on some layers; returns its model."""
    chosen = onelora.OneLoRAConfig(target_modules=list(layers), **config)
    model = fill_vectors(onelora.adapt(base() if of is None else of, chosen), scale, seed)
    onelora.save_adapter(model, path)
    return model


def two_adapters(folder, monkeypatch):
    """The folder is the current one, and holds a.safetensors and b.safetensors."""
    monkeypatch.chdir(folder)
    adapter("a.safetensors", seed=1)
    adapter("b.safetensors", seed=2)
    return folder
