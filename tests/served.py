"""What the example server is tested with: a base, its adapters, and what each must answer."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.examples.serving.backends import CompiledRows, OnnxBank
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors, merged_copy

COUNT, HELD = 12, 2  # adapters, and those that a server starts with


class Tagger(nn.Module):
    """Tokens of any number to numbers for each; ids beyond the table are an error in every runtime."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, tokens):
        return self.layers(self.embedding(tokens))


class World:
    """A base, files of its adapters and the merged model of each in float64, None being the base."""

    def __init__(self, folder):
        torch.manual_seed(0)
        base = Tagger().eval()
        self.files: dict[str, Path] = {}
        self.merged: dict[str | None, nn.Module] = {None: copy.deepcopy(base).double()}
        for seed in range(COUNT):
            model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5, seed=seed)
            self.files[f"a{seed}"] = folder / f"a{seed}.safetensors"
            onelora.save_adapter(model, self.files[f"a{seed}"])
            self.merged[f"a{seed}"] = merged_copy(model, torch.float64)
        self.base, self.bank = base, folder / "bank.onnx"
        shapes = ({0: "batch", 1: "tokens"},)
        held = list(self.files.values())[:HELD]
        tokens = torch.arange(10).reshape(2, 5)
        export_onnx(base, (tokens,), self.bank, adapters="bank", bank=held, dynamic_shapes=shapes)

    def backend(self, kind):
        if kind == "bank":
            return OnnxBank(self.bank, room=COUNT)
        backend = CompiledRows(copy.deepcopy(self.base), {"tokens": torch.arange(10).reshape(2, 5)}, {"tokens": [1]})
        for name in list(self.files)[:HELD]:
            backend.add(self.files[name], name)
        return backend

    def ask(self, client, name, order):
        """One request of a random number of tokens, and whether its answer is right."""
        tokens = torch.from_numpy(order.integers(0, 20, order.integers(1, 6)))
        (found,) = client.predict(name, tokens.numpy()).values()
        want = self.merged[name](tokens[None])[0].detach().numpy()
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
