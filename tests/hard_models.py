"""Models whose graph is hard to adapt, and which way their first call goes."""

import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

INSERTED, AS_IT_IS = "inserted", "as it is"


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True, **options), nn.Linear(8, 8)

    def forward(self, x, mask=None):
        k, v = x[..., : self.attention.kdim], x[..., : self.attention.vdim]
        return self.fc(self.attention(x, k, v, attn_mask=mask, need_weights=False)[0])


class Default(nn.Linear):
    def forward(self, x, scale=1.0):  # has no LoRA to scale, as in older releases of diffusers
        return F.linear(x, self.weight, self.bias)


class Scaled(nn.Linear):
    """Not W x + c: adapted by its output alone."""

    def forward(self, x, scale=1.0):
        return super().forward(x * scale).relu()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=False):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x):
        x = checkpoint(self.block, self.a(x), use_reentrant=False)
        return self.b(checkpoint(lambda y: F.linear(y, self.w).tanh(), x, use_reentrant=False))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.c(torch.cond(x.sum() > 0, lambda y: self.a(y).sin(), lambda y: self.b(y).cos(), (x,)))


class Shared(nn.Module):
    """Two linears with one weight, which is read too: in the graph it is one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x) + F.linear(x, self.b.weight)


class Tied(nn.Module):
    """A weight that an embedding and a linear have in common, and two linears with one weight, all called."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 9), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up.weight, self.b.weight = self.embed.weight, self.a.weight

    def forward(self, ids):
        return self.up(self.b(torch.tanh(self.a(self.embed(ids)))))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Parameter(torch.randn(24, 8) / 3), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v) @ self.out


class Stacked(nn.Module):
    """Every weight is a slice of one parameter, used as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x):
        for one in self.w.unbind(0):
            x = torch.tanh(x @ one.t())
        return x


class Hooked(zoo.MLP):
    def __init__(self):
        super().__init__()
        self.a.register_forward_hook(lambda module, args, y: y * 2)
        self.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def normed(chain):
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 5)) if chain else zoo.MLP()


X = (3, 4, 8)
# name -> (model, inputs, which way the first call goes, and whether train, where that decides)
HARD = {
    "chain": (lambda: normed(True), lambda: {"input": torch.randn(X)}, INSERTED),
    "attention": (Attention, lambda: {"x": torch.randn(X)}, INSERTED),
    "attention_with_other_widths": (lambda: Attention(kdim=6, vdim=4), lambda: {"x": torch.randn(X)}, INSERTED),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
        lambda: {"src": torch.randn(X)},
        INSERTED,
    ),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True),
        lambda: {"src": torch.randn(X), "tgt": torch.randn(3, 2, 8)},
        INSERTED,
    ),
    "default_argument": (
        lambda: nn.Sequential(Default(8, 8), nn.ReLU(), Default(8, 3)),
        lambda: {"input": torch.randn(X)},
        INSERTED,
    ),
    "checkpointed": (Checkpointed, lambda: {"x": torch.randn(X)}, INSERTED),
    "branches": (Branches, lambda: {"x": torch.randn(X)}, INSERTED),
    "shared_and_read": (Shared, lambda: {"x": torch.randn(X)}, AS_IT_IS),
    "tied": (Tied, lambda: {"ids": torch.arange(7)}, INSERTED),
    "packed": (Packed, lambda: {"x": torch.randn(X)}, INSERTED),
    "stacked": (Stacked, lambda: {"x": torch.randn(X)}, INSERTED),
    "hooked": (Hooked, lambda: {"x": torch.randn(5, 8)}, INSERTED),
}
