"""Small ONNX graphs by hand, and adapters of their weights."""

import numpy as np
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def adapter_of(folder, *weights, scale=0.3):
    """An adapter of linears with given weights [out, in], and its vectors as float64 arrays."""
    torch.manual_seed(1)
    linears = [nn.Linear(w.shape[1], w.shape[0]) for w in weights]
    with torch.no_grad():
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(torch.from_numpy(np.array(weight, np.float32)))
    model = fill_vectors(onelora.adapt(nn.Sequential(*linears), onelora.OneLoRAConfig(target_modules=r"\d+")), scale)
    onelora.save_adapter(model, folder / "own.safetensors")
    return folder / "own.safetensors", [v.detach().double().numpy() for v in onelora.vectors(model).values()]
