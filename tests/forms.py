"""Modules that use weights in every way that is a linear map, and what their vectors should be."""

import pytest
import torch
from form_parts import module, weight
from spelled_forms import SPELLINGS
from torch import nn
from torch.nn import functional as F


def helper(x, w):
    return F.linear(x, w)


def chunked(self, x):
    q, k, v = (F.linear(x, w) for w in self.w.chunk(3))
    return q * k + v


def split(self, x):
    return sum(i * (x @ w.t()) for i, w in enumerate(torch.split(self.w, [3, 7, 2]), 1) for w in [w[:2]])


def branches(self, x):
    if x.shape[0] > 100:
        raise ValueError("too many")
    if x.shape[-1] != 8:
        x = x[..., :8]
    return F.linear(x, self.w)


def beit(self, x):
    bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.q_bias))
    return F.linear(x, self.qkv.weight, bias)


def experts(self, x):
    ids = torch.arange(x.shape[0]) % 3
    return torch.bmm(self.w[ids], x.unsqueeze(-1)).squeeze(-1)


# name -> (module, shape of x, {vector: shape})
FORMS = {
    "linear": (lambda: module(lambda s, x: F.linear(x, s.w), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "linear_called_weight": (
        lambda: module(lambda s, x: F.linear(x, s.weight), weight=weight(6, 8)),
        (5, 8),
        {"": (6,)},
    ),
    "matmul": (lambda: module(lambda s, x: x @ s.w, w=weight(8, 6)), (2, 5, 8), {"w": (6,)}),
    "square": (lambda: module(lambda s, x: x @ s.w, w=weight(8, 8)), (5, 8), {"w": (8,)}),
    "matmul_T": (lambda: module(lambda s, x: x @ s.w.T, w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "matmul_mT": (lambda: module(lambda s, x: torch.matmul(x, s.w.mT), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "matmul_H": (lambda: module(lambda s, x: torch.matmul(x, s.w.H), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "matmul_mH": (lambda: module(lambda s, x: torch.matmul(x, s.w.mH), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "mm": (lambda: module(lambda s, x: torch.mm(x, s.w.transpose(0, 1)), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "addmm": (lambda: module(lambda s, x: torch.addmm(s.c, x, s.w), w=weight(8, 6), c=weight(6)), (5, 8), {"w": (6,)}),
    "left": (lambda: module(lambda s, x: (s.w @ x.mT).mT, w=weight(6, 8)), (2, 5, 8), {"w": (6,)}),
    "left_of_a_vector": (lambda: module(lambda s, x: s.w @ x, w=weight(6, 8)), (8,), {"w": (6,)}),
    "einsum": (
        lambda: module(lambda s, x: torch.einsum("bni,oi->bno", x, s.w), w=weight(6, 8)),
        (2, 5, 8),
        {"w": (6,)},
    ),
    "einsum_swapped": (
        lambda: module(lambda s, x: torch.einsum("io, bni -> bon", s.w, x), w=weight(8, 6)),
        (2, 5, 8),
        {"w": (6,)},
    ),
    "einsum_ellipsis": (
        lambda: module(lambda s, x: torch.einsum("...i,oi->...o", x, s.w), w=weight(6, 8)),
        (2, 5, 8),
        {"w": (6,)},
    ),
    "einsum_heads": (
        lambda: module(lambda s, x: torch.einsum("ibh,hnd->ibnd", x, s.w), w=weight(8, 2, 3)),
        (5, 2, 8),
        {"w": (2, 3)},
    ),
    "einsum_two_inputs": (
        lambda: module(lambda s, x: torch.einsum("bnd,hnd->bh", x.view(-1, 2, 4), s.w), w=weight(6, 2, 4)),
        (5, 8),
        {"w": (6,)},
    ),
    "einsum_experts": (
        lambda: module(lambda s, x: torch.einsum("ebi,eio->ebo", x, s.w), w=weight(3, 8, 6)),
        (3, 5, 8),
        {"w": (3, 6)},
    ),
    "bmm": (lambda: module(lambda s, x: torch.bmm(x, s.w), w=weight(3, 8, 6)), (3, 5, 8), {"w": (3, 6)}),
    "bmm_mT": (lambda: module(lambda s, x: x @ s.w.transpose(-1, -2), w=weight(3, 6, 8)), (3, 5, 8), {"w": (3, 6)}),
    "baddbmm": (
        lambda: module(lambda s, x: torch.baddbmm(s.c[:, None], x, s.w), w=weight(3, 8, 6), c=weight(3, 6)),
        (3, 5, 8),
        {"w": (3, 6)},
    ),
    "experts_by_index": (lambda: module(experts, w=weight(3, 6, 8)), (5, 8), {"w": (3, 6)}),
    "slices": (
        lambda: module(
            lambda s, x: F.linear(x, s.w[:4]) @ s.w[4:8, :4] + F.linear(x, s.w[8:]).sum(-1, True), w=weight(12, 8)
        ),
        (5, 8),
        None,  # as W and as its transpose
    ),
    "sliced": (
        lambda: module(
            lambda s, x: F.linear(x, s.w[:4]) * F.linear(x, s.w[4:8]) + F.linear(x, s.w[8:]), w=weight(12, 8)
        ),
        (5, 8),
        {"w": (12,)},
    ),
    "chunked": (lambda: module(chunked, w=weight(12, 8)), (5, 8), {"w": (12,)}),
    "split": (lambda: module(split, w=weight(12, 8)), (5, 8), {"w": (12,)}),
    "unflattened": (
        lambda: module(lambda s, x: x[..., None, :] @ s.w.view(3, 4, 8).mT.permute(0, 1, 2)[1], w=weight(12, 8)),
        (5, 8),
        {"w": (12,)},
    ),
    "cast": (
        lambda: module(lambda s, x: F.linear(x, s.w.to(x.dtype).contiguous()), w=weight(6, 8)),
        (5, 8),
        {"w": (6,)},
    ),
    "by_a_helper": (lambda: module(lambda s, x: helper(x, s.w), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "branches": (lambda: module(branches, w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "weight_of_a_child": (
        lambda: module(beit, qkv=nn.Linear(8, 12, bias=False), q_bias=weight(4)),
        (5, 8),
        {"qkv": (12,)},
    ),
    "child_on_the_right": (
        lambda: module(lambda s, x: (s.dt.weight @ x.mT).mT, dt=nn.Linear(8, 6)),
        (2, 5, 8),
        {"dt": (6,)},
    ),
    "called_and_transposed": (
        lambda: module(lambda s, x: s.fc(x).relu() @ s.fc.weight, fc=nn.Linear(8, 6)),
        (5, 8),
        {"fc": (6,)},
    ),
    "called_and_transposed_square": (
        lambda: module(lambda s, x: F.linear(s.fc(x).relu(), s.fc.weight.T), fc=nn.Linear(8, 8)),
        (5, 8),
        {"fc": (8,)},
    ),
    "both_ways_of_a_linear": (
        lambda: module(lambda s, x: F.linear(x, s.fc.weight).relu() @ s.fc.weight, fc=nn.Linear(8, 6)),
        (5, 8),
        {"fc": (6,)},
    ),
    "parameter_list": (
        lambda: module(lambda s, x: x @ s.ws[0] @ s.ws[1], ws=nn.ParameterList([weight(8, 4), weight(4, 6)])),
        (5, 8),
        {"ws.0": (4,), "ws.1": (6,)},
    ),
    "parameter_of_a_child": (
        lambda: module(lambda s, x: F.linear(x, s.child.kernel), child=module(None, kernel=weight(6, 8))),
        (5, 8),
        {"child.kernel": (6,)},
    ),
    "given_to_the_child_that_holds_it": (
        lambda: module(lambda s, x: s.child(x, s.child.w1), child=module(lambda s, x, w: x @ w.T, w1=weight(6, 8))),
        (5, 8),
        {"child.w1": (6,)},
    ),
    "list_in_a_list": (
        lambda: module(
            lambda s, x: x @ s.tables[0][0] @ s.tables[0][1],
            tables=nn.ModuleList([nn.ParameterList([weight(8, 4), weight(4, 6)])]),
        ),
        (5, 8),
        {"tables.0.0": (4,), "tables.0.1": (6,)},
    ),
    "one_row": (lambda: module(lambda s, x: F.linear(x, s.w), w=weight(1, 8)), (5, 8), {"w": (1,)}),
    "one_column": (lambda: module(lambda s, x: F.linear(x[:, :1], s.w), w=weight(6, 1)), (5, 8), {"w": (6,)}),
}

FORMS |= SPELLINGS
ADAPTED = [name for name, (_, _, vectors) in FORMS.items() if vectors is not None]
LONG = [pytest.param(name, marks=[pytest.mark.slow] * (name in SPELLINGS)) for name in ADAPTED]


def build(name, among=FORMS):
    made, shape, vectors = among[name]
    torch.manual_seed(0)
    return made(), torch.randn(*shape), vectors
