"""Complex weights: the method is of real numbers, so they are left out by name, and the base stays what it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import TargetError


class Mixed(nn.Module):
    """A real linear, and every way to use a complex weight that is adapted where it is real."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.cfloat)
        self.w = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))
        self.attention = nn.MultiheadAttention(8, 2, dtype=torch.cfloat)

    def forward(self, x):
        return torch.view_as_real(self.c(self.a(x).to(torch.cfloat)) @ self.w)


def test_complex_weights_are_left_out_by_name():
    model, x = Mixed(), torch.randn(5, 8)
    before = model(x)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["a"]
    summary = " ".join(str(onelora.summary(model)).split())
    assert "no vector on w, c, attention.in_proj_weight, attention.out_proj: a complex weight" in summary
    assert torch.equal(model(x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are no weights that adapt missed
        compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
        torch.testing.assert_close(compiled(x), before)


@pytest.mark.parametrize("name", ["c", "w", "attention.out_proj"])
def test_one_that_is_asked_for_by_name_is_refused(name):
    with pytest.raises(TargetError, match=f"matches only '{name}': a complex weight"):
        onelora.adapt(Mixed(), onelora.OneLoRAConfig(target_modules=[name]))


def test_a_model_of_complex_linears_alone_is_refused():
    with pytest.raises(TargetError, match="a complex weight"):
        onelora.adapt(nn.Sequential(nn.Linear(8, 4, dtype=torch.cdouble)))


def test_a_convolution_of_patches_that_is_asked_for_is_refused_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4, dtype=torch.cfloat), nn.Flatten())
    with pytest.raises(TargetError, match="matches only '0': a complex weight"):
        onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["0"]))
