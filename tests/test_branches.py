"""Weights that are read in one branch on values alone: all branches are followed."""

import pytest
import torch
from form_parts import module, weight
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy


def elif_branches(self, x):
    mean = x.mean()
    if mean > 9:
        return x @ self.ws[0]
    elif mean > 8:
        return x @ self.ws[1]
    elif mean > -9:
        return x @ self.ws[2]
    return x @ self.ws[3]


def nested_branches(self, x):
    mean = x.mean()
    if mean > -9:
        if mean > -8:
            if mean > 9:
                return x @ self.ws[0]
            return x @ self.ws[1]
        return x @ self.ws[2]
    return x @ self.ws[3]


def loop_on_a_value(self, x):
    total, count = x @ self.ws[3], 0
    while x.norm() > 1:
        count += 1
        x = (x @ self.ws[0]) * 0.1
        if count > 1:
            total = total + x @ self.ws[1] + x @ self.ws[2]
    return total


@pytest.mark.parametrize("forward", [elif_branches, nested_branches, loop_on_a_value])
def test_every_branch_on_values_is_followed(forward):
    model = module(forward, ws=nn.ParameterList([weight(8, 8) for _ in range(4)]))
    onelora.adapt(model)
    assert {*onelora.vectors(model)} == {f"ws.{number}" for number in range(4)}
    fill_vectors(model, 0.5)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), merged_copy(model)(x))
