"""Three linears, two of one input, as the graphs that the passes are tested on."""

import torch
from torch import fx, nn

from onelora_compile.passes import (
    insert_rank1,
)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.o(self.q(x) * self.k(x))


VECTORS = {"q": torch.randn(3), "k": torch.randn(3), "o": torch.randn(2)}


def traced(model=None):
    return fx.symbolic_trace(model or Siblings())


def inserted(model=None, vectors=VECTORS):
    gm = traced(model)
    result, inputs = insert_rank1(gm, vectors)
    gm.recompile()
    return gm, result, inputs


def captured(model, *args):
    """The graph that Dynamo hands to a backend, with example values on its nodes; `gm.inputs` feeds it."""
    graphs = []

    def keep(gm, example_inputs):
        gm.inputs = example_inputs
        graphs.append(gm)
        return gm

    torch.compile(model, backend=keep, fullgraph=True)(*args)
    return graphs[0]
