"""Uses of parameters in products that are no linear ops."""

import torch
from form_parts import module, weight
from torch import nn
from torch.nn import functional as F

# Uses of a weight that get no vector, and what `summary` says of each of its parameters.
NAMED = {
    "bilinear": (
        lambda: module(lambda s, x: F.bilinear(x, x, s.w), w=weight(6, 8, 8)),
        (5, 8),
        {"w": "used by bilinear"},
    ),
    "bilinear_module": (lambda: module(lambda s, x: s.b(x, x), b=nn.Bilinear(8, 8, 6)), (5, 8), {"b": "bilinear form"}),
    "vecdot": (
        lambda: module(lambda s, x: torch.linalg.vecdot(x[:, None], s.w), w=weight(6, 8)),
        (5, 8),
        {"w": "used by vecdot"},
    ),
    "multi_dot": (
        lambda: module(lambda s, x: torch.linalg.multi_dot([x, s.w, s.v]), w=weight(8, 6), v=weight(6, 3)),
        (5, 8),
        {"w": "used by multi_dot", "v": "used by multi_dot"},
    ),
    "einsum_of_three": (
        lambda: module(lambda s, x: torch.einsum("bi,ri,or->bo", x, s.a, s.b), a=weight(2, 8), b=weight(6, 2)),
        (5, 8),
        {"a": "used by einsum", "b": "used by einsum"},
    ),
    "einsum_diagonal": (
        lambda: module(lambda s, x: torch.einsum("bi,ii->bi", x, s.w), w=weight(8, 8)),
        (5, 8),
        {"w": "used by einsum"},
    ),
    "product_of_parameters": (
        lambda: module(lambda s, x: x @ (s.a @ s.b), a=weight(8, 2), b=weight(2, 6)),
        (5, 8),
        {"a": "used by matmul", "b": "used by matmul"},
    ),
    "computed": (lambda: module(lambda s, x: F.linear(x, s.w * 2), w=weight(6, 8)), (5, 8), {"w": "is computed from"}),
    "quantised": (
        lambda: module(lambda s, x: x @ (s.w * 20).to(torch.int8).to(x.dtype), w=weight(8, 6)),
        (5, 8),
        {"w": "is computed from"},
    ),
    "mixed": (
        lambda: module(lambda s, x: F.linear(x, s.w.reshape(8, 6).T.contiguous()), w=weight(6, 8)),
        (5, 8),
        {"w": "a view that mixes its axes"},
    ),
    "attention": (
        lambda: module(lambda s, x: F.scaled_dot_product_attention(x, s.k, s.k), k=weight(7, 8)),
        (5, 8),
        {"k": "used by scaled_dot_product_attention"},
    ),
    "convolution": (
        lambda: module(lambda s, x: F.conv1d(x, s.w, padding=1), w=weight(6, 5, 3)),
        (5, 8),
        {"w": "a convolution"},
    ),
    "transposed_convolution": (
        lambda: module(lambda s, x: F.conv_transpose1d(x, s.w), w=weight(5, 6, 3)),
        (5, 8),
        {"w": "used by conv_transpose1d"},
    ),
    "recurrent_cell": (lambda: module(lambda s, x: s.cell(x), cell=nn.GRUCell(8, 6)), (5, 8), {"cell": "recurrent"}),
    "product_and_sum": (
        lambda: module(lambda s, x: (x[:, None] * s.w).sum(-1), w=weight(6, 8)),
        (5, 8),
        {"w": "used by mul and sum"},
    ),
    "product_and_sum_over_the_middle": (
        lambda: module(lambda s, x: torch.mul(x[:, :, None], s.w).float().sum(axis=1), w=weight(8, 6)),  # type: ignore[call-overload]
        (5, 8),
        {"w": "used by mul and sum"},
    ),
    "rows_and_sums": (
        lambda: module(lambda s, x: torch.stack([(x * row).mean(-1) for row in s.w], -1), w=weight(6, 8)),
        (5, 8),
        {"w": "used by mul and mean"},
    ),
    "masked_product_and_sum": (
        lambda: module(lambda s, x: (x[:, None] * (s.w * 2)).sum(-1), w=weight(6, 8)),
        (5, 8),
        {"w": "the weight of mul and sum is computed"},
    ),
    "foreign_operator": (
        lambda: module(lambda s, x: torch.ops.forms.linear(x, s.w), w=weight(6, 8)),
        (5, 8),
        {"w": "given to forms::linear"},
    ),
}

# An operator of another library with a name of PyTorch's.
_library = torch.library.Library("forms", "DEF")
_library.define("linear(Tensor x, Tensor w) -> Tensor")
_library.impl("linear", lambda x, w: F.linear(x, w).relu(), "CompositeImplicitAutograd")
