"""What the forms of `forms.py` are made of: random weights, and modules of a forward and parameters."""

import torch
from torch import nn

X = torch.Generator().manual_seed(7)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape, generator=X) / shape[-1] ** 0.5)


def module(forward, **parameters):
    """A module with these parameters and this forward(self, x)."""

    class Form(nn.Module):
        def __init__(self):
            super().__init__()
            for name, parameter in parameters.items():
                setattr(self, name, parameter)

    Form.forward = forward
    return Form()
