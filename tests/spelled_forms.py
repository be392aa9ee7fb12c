"""Every keyword and every spelling of the ops of `forms.py`, apart for tests that take long."""

import torch
from form_parts import module, weight
from torch.nn import functional as F

# name -> (module, shape of x, {vector: shape})
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
