"""Modules that use weights in every way that is a linear map, and what their vectors should be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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

# Every keyword and every spelling of those ops: of FORMS too, apart for tests that take long.
SPELLINGS = {
    # every keyword and every spelling of the products that scale
    "addmm_scaled": (
        lambda: module(lambda s, x: torch.addmm(s.c, x, s.w, alpha=0.5, beta=3), w=weight(8, 6), c=weight(6)),
        (5, 8),
        {"w": (6,)},
    ),
    "addmm_method": (
        lambda: module(lambda s, x: s.c.addmm(x, s.w, beta=0, alpha=-2), w=weight(8, 6), c=weight(6)),
        (5, 8),
        {"w": (6,)},
    ),
    "addmm_keywords": (
        lambda: module(
            lambda s, x: torch.addmm(alpha=2, mat2=s.w, mat1=x, beta=0.5, input=s.c), w=weight(8, 6), c=weight(6)
        ),
        (5, 8),
        {"w": (6,)},
    ),
    "addmm_aten": (
        lambda: module(lambda s, x: torch.ops.aten.addmm(s.c, x, s.w, alpha=3), w=weight(8, 6), c=weight(6)),
        (5, 8),
        {"w": (6,)},
    ),
    "addmm_left": (
        lambda: module(lambda s, x: torch.addmm(s.c, s.w, x.T, alpha=0.25), w=weight(6, 8), c=weight(1)),
        (5, 8),
        {"w": (6,)},
    ),
    "addmm_in_place": (
        lambda: module(lambda s, x: (x[:, :6] * 1).addmm_(x, s.w, alpha=0.5, beta=2) + 1, w=weight(8, 6)),
        (5, 8),
        {"w": (6,)},
    ),
    "baddbmm_scaled": (
        lambda: module(
            lambda s, x: torch.baddbmm(s.c[:, None], x, s.w, beta=2, alpha=0.5), w=weight(3, 8, 6), c=weight(3, 6)
        ),
        (3, 5, 8),
        {"w": (3, 6)},
    ),
    "baddbmm_method": (
        lambda: module(lambda s, x: x[:, :4].baddbmm(s.w, x, alpha=-0.5), w=weight(3, 4, 5)),
        (3, 5, 8),
        {"w": (3, 4)},
    ),
    "baddbmm_in_place": (
        lambda: module(lambda s, x: (x[..., :6] * 1).baddbmm_(x, s.w, alpha=0.5).relu(), w=weight(3, 8, 6)),
        (3, 5, 8),
        {"w": (3, 6)},
    ),
    "addbmm": (
        lambda: module(lambda s, x: torch.addbmm(s.c, x, s.w, beta=2, alpha=0.5), w=weight(3, 8, 6), c=weight(6)),
        (3, 5, 8),
        {"w": (6,)},
    ),
    "addbmm_left": (
        lambda: module(lambda s, x: s.c.addbmm(s.w, x.mT, alpha=2), w=weight(3, 6, 8), c=weight(6, 1)),
        (3, 5, 8),
        {"w": (6,)},
    ),
    "mv": (lambda: module(lambda s, x: torch.mv(s.w, x), w=weight(6, 8)), (8,), {"w": (6,)}),
    "mv_method": (lambda: module(lambda s, x: s.w.T.mv(vec=x), w=weight(8, 6)), (8,), {"w": (6,)}),
    "addmv": (
        lambda: module(lambda s, x: torch.addmv(s.c, s.w, x, beta=2, alpha=-0.5), w=weight(6, 8), c=weight(6)),
        (8,),
        {"w": (6,)},
    ),
    # every operand in every place
    "linear_keywords": (
        lambda: module(lambda s, x: F.linear(bias=s.c, weight=s.w, input=x), w=weight(6, 8), c=weight(6)),
        (5, 8),
        {"w": (6,)},
    ),
    "linear_aten": (
        lambda: module(lambda s, x: torch.ops.aten.linear.default(x, s.w, s.c), w=weight(6, 8), c=weight(6)),
        (5, 8),
        {"w": (6,)},
    ),
    "linear_weight_first": (
        lambda: module(lambda s, x: F.linear(s.w, x, x.sum(-1)).T, w=weight(6, 8)),
        (5, 8),
        {"w": (6,)},
    ),
    "linear_weight_first_batched": (
        lambda: module(lambda s, x: F.linear(s.w, x), w=weight(3, 6, 8)),
        (5, 8),
        {"w": (3, 6)},
    ),
    "mm_keywords": (lambda: module(lambda s, x: torch.mm(mat2=s.w, input=x), w=weight(8, 6)), (5, 8), {"w": (6,)}),
    "matmul_method": (lambda: module(lambda s, x: x.matmul(other=s.w), w=weight(8, 6)), (5, 8), {"w": (6,)}),
    "matmul_linalg": (lambda: module(lambda s, x: torch.linalg.matmul(x, s.w), w=weight(8, 6)), (5, 8), {"w": (6,)}),
    "matmul_reversed": (lambda: module(lambda s, x: s.w.__rmatmul__(x), w=weight(8, 6)), (5, 8), {"w": (6,)}),
    "matmul_of_a_vector": (lambda: module(lambda s, x: x @ s.w, w=weight(8, 6)), (8,), {"w": (6,)}),
    "matmul_experts_of_a_vector": (lambda: module(lambda s, x: x @ s.w, w=weight(3, 8, 6)), (8,), {"w": (3, 6)}),
    "left_experts": (lambda: module(lambda s, x: s.w @ x.mT, w=weight(3, 6, 8)), (5, 8), {"w": (3, 6)}),
    "left_experts_of_a_vector": (lambda: module(lambda s, x: s.w @ x, w=weight(3, 6, 8)), (8,), {"w": (3, 6)}),
    "matmul_H": (lambda: module(lambda s, x: x @ s.w.H, w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "tensordot": (lambda: module(lambda s, x: torch.tensordot(x, s.w, dims=1), w=weight(8, 6)), (2, 5, 8), {"w": (6,)}),
    "tensordot_axes": (
        lambda: module(lambda s, x: torch.tensordot(x, s.w, ([1, -1], [2, 0])), w=weight(8, 6, 5)),
        (2, 5, 8),
        {"w": (6,)},
    ),
    "tensordot_weight_first": (
        lambda: module(lambda s, x: torch.tensordot(s.w, x, dims=([-1], [1])), w=weight(2, 6, 8)),
        (5, 8),
        {"w": (2, 6)},
    ),
    "inner": (lambda: module(lambda s, x: torch.inner(x, s.w), w=weight(6, 8)), (2, 5, 8), {"w": (6,)}),
    "inner_weight_first": (lambda: module(lambda s, x: s.w.inner(x), w=weight(6, 8)), (5, 8), {"w": (6,)}),
    "einsum_of_one_input_for_all": (
        lambda: module(lambda s, x: torch.einsum("bni,oi->bno", x, s.w), w=weight(6, 8)),
        (2, 5, 1),
        {"w": (6,)},
    ),
    "einsum_of_one_head_for_all": (
        lambda: module(lambda s, x: torch.einsum("bnd,hnd->bh", x, s.w), w=weight(6, 5, 8)),
        (2, 1, 8),
        {"w": (6,)},
    ),
    "tensordot_of_one_input_for_all": (
        lambda: module(lambda s, x: torch.tensordot(x, s.w, ([1], [1])), w=weight(6, 8)),
        (5, 1),
        {"w": (6,)},
    ),
    "einsum_implicit": (
        lambda: module(lambda s, x: torch.einsum("bi,io", x, s.w), w=weight(8, 6)),
        (5, 8),
        {"w": (6,)},
    ),
    "einsum_lists": (
        lambda: module(lambda s, x: torch.einsum(x, [..., 0], s.w, [1, 0], [..., 1]), w=weight(6, 8)),
        (2, 5, 8),
        {"w": (6,)},
    ),
    "einsum_of_a_list": (
        lambda: module(lambda s, x: torch.einsum("bi,oi->ob", [x, s.w]), w=weight(6, 8)),
        (5, 8),
        {"w": (6,)},
    ),
    "einsum_ellipsis_in_both": (
        lambda: module(lambda s, x: torch.einsum("...ni,...io->...no", x, s.w), w=weight(3, 8, 6)),
        (3, 5, 8),
        {"w": (3, 6)},
    ),
}
FORMS |= SPELLINGS
ADAPTED = [name for name, (_, _, vectors) in FORMS.items() if vectors is not None]
LONG = [pytest.param(name, marks=[pytest.mark.slow] * (name in SPELLINGS)) for name in ADAPTED]


def build(name, among=FORMS):
    made, shape, vectors = among[name]
    torch.manual_seed(0)
    return made(), torch.randn(*shape), vectors
