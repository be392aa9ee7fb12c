"""Rows of a weight that are picked by an index of dynamic size: the update moves, and every size has one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.testing import assert_parity, fill_vectors

EXPERTS, OUT, IN = 3, 6, 8


def each(w, x, ids):
    return torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1)


def selected(w, x, ids):
    return (w.index_select(0, ids) @ x.unsqueeze(-1)).squeeze(-1)


def part(w, x, ids):
    return torch.bmm(x[:, None], w[:, 1:4][ids].mT).squeeze(1)


def rows(w, x, ids):
    return F.linear(x, w.view(EXPERTS * OUT, IN)[ids])


class Experts(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(EXPERTS, OUT, IN)), use

    def forward(self, x, ids):
        return self.use(self.w, x, ids)


@pytest.mark.parametrize("use", [each, selected, part, rows])
def test_one_graph_for_every_size(use):
    torch.manual_seed(0)
    model = Experts(use)
    w = copy.deepcopy(model.w.detach())
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_parameters={"w": 2})), 0.5)
    (vector,) = (one.detach() for one in onelora.vectors(model).values())
    graphs = []

    def inner(gm, inputs):
        graphs.append([node.target for node in gm.graph.nodes])
        return gm.forward

    options: dict[str, Any] = {"inner": inner}
    run = torch.compile(model, backend="onelora", options=options, fullgraph=True, dynamic=True)
    for size in (5, 9, 7):
        x, ids = torch.randn(size, IN), torch.randint(0, EXPERTS, (size,))
        exact = use(w.double() + vector.double().unsqueeze(-1), x.double(), ids)
        assert_parity(run(x, ids), exact, use(w + vector.unsqueeze(-1), x, ids))
    (graph,) = graphs
    assert ADAPTED_WEIGHT not in graph
