"""Models with linears that are written by hand on bare parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FusedBiasBlock(nn.Module):
    """As BEiT in timm: one qkv linear without a bias, the bias put together from parts with no key bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(self.norm1(x), self.qkv.weight, bias)
        q, k, v = qkv.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.gamma1 * self.proj(attended)
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FusedBiasViT(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(FusedBiasBlock(width, 3), FusedBiasBlock(width, 3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x.mean(1)))


class MatmulProjection(nn.Module):
    """As the visual tower of OpenAI's CLIP: a `[width, out]` parameter, applied from the right."""

    def __init__(self, width: int = 32, out: int = 16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, out))

    def forward(self, x):
        x = self.fc1(x)
        x = self.norm(x + self.fc2(F.gelu(x)))
        return x[:, 0] @ self.proj


class PackedSlices(nn.Module):
    """One `[3d, d]` parameter, used in three slices, as the in_proj_weight of an attention written by hand."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.width = width
        self.embed, self.out = nn.Linear(12, width), nn.Linear(width, 5)
        self.norm = nn.LayerNorm(width)
        self.w, self.b = nn.Parameter(0.2 * torch.randn(3 * width, width)), nn.Parameter(0.1 * torch.randn(3 * width))

    def forward(self, x):
        d = self.width
        x = self.embed(x)
        y = self.norm(x)
        q, k = F.linear(y, self.w[:d], self.b[:d]), F.linear(y, self.w[d : 2 * d], self.b[d : 2 * d])
        v = F.linear(y, self.w[2 * d :], self.b[2 * d :])
        return self.out((x + F.scaled_dot_product_attention(q, k, v)).mean(1))


class EinsumLinear(nn.Module):
    """Linears spelled as einsum: into heads by a 3-D weight, out of them by another, and a plain 2-D one."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        size = width // heads
        self.embed = nn.Linear(12, width)
        self.norm = nn.LayerNorm(width)
        self.into = nn.Parameter(0.2 * torch.randn(width, heads, size))
        self.back = nn.Parameter(0.2 * torch.randn(heads, size, width))
        self.last = nn.Parameter(0.2 * torch.randn(5, width))

    def forward(self, x):
        x = self.embed(x)
        y = torch.einsum("bnd,dhe->bnhe", self.norm(x), self.into)
        x = x + torch.einsum("bnhe,hed->bnd", F.gelu(y), self.back)
        return torch.einsum("bnd,cd->bnc", x, self.last)


class SwitchExperts(nn.Module):
    """Top-1 routing; every expert sees all tokens with those of the others zeroed, in one torch.bmm each way."""

    def __init__(self, width: int, hidden: int, experts: int):
        super().__init__()
        self.experts = experts
        self.router = nn.Linear(width, experts)
        self.w1 = nn.Parameter(width**-0.5 * torch.randn(experts, width, hidden))
        self.w2 = nn.Parameter(hidden**-0.5 * torch.randn(experts, hidden, width))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gate, expert = self.router(tokens).softmax(-1).max(-1)
        mask = F.one_hot(expert, self.experts).to(x.dtype)
        dispatched = mask.t().unsqueeze(-1) * tokens
        out = torch.bmm(torch.relu(torch.bmm(dispatched, self.w1)), self.w2)
        return (out.sum(0) * gate.unsqueeze(-1)).view_as(x)


class SwitchMoE(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(SwitchExperts(width, 48, 3) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x.mean(1))
