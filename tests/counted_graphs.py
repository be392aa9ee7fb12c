"""How many graphs a compiled model has, and what its first call says."""

import copy
import warnings

import torch

import onelora_compile as onelora


class Counter:
    """An inner backend that counts graphs and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return gm


def build(counter, model, **how):
    return torch.compile(model, backend="onelora", options={"inner": counter}, **how)


def base_with(model, base):
    """The base, adapted before any compiled call, with the vectors of the model."""
    twin = onelora.adapt(copy.deepcopy(base))
    with torch.no_grad():
        for name, vector in onelora.vectors(twin).items():
            vector.copy_(onelora.vectors(model)[name])
    return twin


def first_call(compiled, *args, **kwargs):
    """What a call returns, and the backend's messages."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = compiled(*args, **kwargs)
    return out, [str(w.message) for w in caught if issubclass(w.category, onelora.OneLoRAWarning)]
