"""An adapter file to load, or to damage."""

import copy

import zoo

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def saved(folder):
    """A base, an adapted and trained copy of it, and its file."""
    base, inputs = zoo.tiny_vit()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    path = folder / "a.safetensors"
    onelora.save_adapter(model, path)
    return base, model, path, inputs
