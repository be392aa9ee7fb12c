"""A module that stands in a model under several names: one vector, one weight, in every mode."""

from itertools import pairwise

import pytest
import torch
from mode_cases import MODES
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors


class Block(nn.Module):
    shift: torch.Tensor

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x):
        return torch.tanh(self.linear(x)) + self.shift


def one_linear_twice():
    linear = nn.Linear(8, 8)
    return nn.Sequential(linear, nn.Tanh(), linear, nn.Linear(8, 3))


def one_block_twice():
    block = Block(nn.Linear(8, 8))
    return nn.Sequential(block, nn.Tanh(), block, nn.Linear(8, 3))


def one_linear_of_two_blocks():
    linear = nn.Linear(8, 8)
    return nn.Sequential(Block(linear), Block(linear), nn.Linear(8, 3))


def one_buffer_of_two_blocks():
    model = nn.Sequential(*(Block(nn.Linear(8, 8)) for _ in range(3)))
    for one, other in pairwise(model):
        other.shift = one.shift
    return model


BUILDERS = [one_linear_twice, one_block_twice, one_linear_of_two_blocks, one_buffer_of_two_blocks]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", BUILDERS)
def test_every_mode(build, mode, tmp_path):
    torch.manual_seed(0)
    model, x, adapter = build(), torch.randn(2, 8), tmp_path / "a.safetensors"
    fill_vectors(onelora.adapt(model), 0.3)
    onelora.save_adapter(model, adapter)
    report = export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode, bank=[adapter] if mode == "bank" else ())
    assert not report.unused
    assert report.parity is not None
    assert report.parity.passed
