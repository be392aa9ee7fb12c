"""A small adapted model for `export_program`, and what its program is called with."""

import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters.calls.signature import identifiers
from onelora_compile.testing import perturb_norms

MODES = ("fold", "input")


class Two(nn.Module):
    """Named layers, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def as_inputs(values):
    return dict(zip(identifiers(values), values.values(), strict=True))


def small(**options):
    torch.manual_seed(0)
    model = onelora.adapt(perturb_norms(Two()).eval(), onelora.OneLoRAConfig(**options))
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model
