"""Models in plain torch: the modules of torch.nn, and linears written by hand on bare parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from architectures.outputs import settle


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, width: int = 32):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embed = nn.Linear(12, width)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class Translator(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.source, self.target = nn.Embedding(20, width), nn.Embedding(20, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 20)

    def forward(self, source, target):
        return self.head(self.transformer(self.source(source), self.target(target)))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with its own kdim and vdim, hence separate projection parameters."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.query = nn.Linear(12, width)
        self.attention = nn.MultiheadAttention(width, 4, kdim=20, vdim=24, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x, key, value):
        q = self.query(x)
        return self.head(self.norm(q + self.attention(q, key, value, need_weights=False)[0]).mean(1))


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


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token1, self.token2 = nn.Linear(tokens, 24), nn.Linear(24, tokens)
        self.channel1, self.channel2 = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x):
        y = self.norm1(x).transpose(1, 2)
        x = x + self.token2(F.gelu(self.token1(y))).transpose(1, 2)
        return x + self.channel2(F.gelu(self.channel1(self.norm2(x))))


class Mixer(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


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


class Recurrent(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layers = nn.Sequential(Residual(8, 16, 2), Residual(16, 32, 2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


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


def encoder_post_norm():
    torch.manual_seed(0)
    return settle(Encoder(norm_first=False)), {"x": torch.randn(3, 7, 12)}


def encoder_pre_norm():
    torch.manual_seed(0)
    return settle(Encoder(norm_first=True)), {"x": torch.randn(3, 7, 12)}


def transformer():
    torch.manual_seed(0)
    return settle(Translator()), {"source": torch.randint(0, 20, (2, 7)), "target": torch.randint(0, 20, (2, 5))}


def cross_attention():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 5, 12), "key": torch.randn(2, 7, 20), "value": torch.randn(2, 7, 24)}
    return settle(CrossAttention()), inputs


def fused_bias_vit():
    torch.manual_seed(0)
    return settle(FusedBiasViT()), {"x": torch.randn(2, 3, 16, 16)}


def matmul_projection():
    torch.manual_seed(0)
    return settle(MatmulProjection()), {"x": torch.randn(3, 7, 12)}


def mixer():
    torch.manual_seed(0)
    return settle(Mixer()), {"x": torch.randn(2, 3, 16, 16)}


def packed_slices():
    torch.manual_seed(0)
    return settle(PackedSlices()), {"x": torch.randn(3, 7, 12)}


def einsum_linear():
    torch.manual_seed(0)
    return settle(EinsumLinear()), {"x": torch.randn(3, 7, 12)}


def lstm():
    torch.manual_seed(0)
    return settle(Recurrent()), {"ids": torch.randint(0, 20, (2, 7))}


def resnet():
    torch.manual_seed(0)
    return settle(ResNet()), {"x": torch.randn(2, 3, 16, 16)}


def switch_moe():
    torch.manual_seed(0)
    return settle(SwitchMoE()), {"x": torch.randn(3, 7, 12)}


PLAIN = {
    "encoder_post_norm": encoder_post_norm,
    "encoder_pre_norm": encoder_pre_norm,
    "transformer": transformer,
    "cross_attention": cross_attention,
    "fused_bias_vit": fused_bias_vit,
    "matmul_projection": matmul_projection,
    "mixer": mixer,
    "packed_slices": packed_slices,
    "einsum_linear": einsum_linear,
    "lstm": lstm,
    "resnet": resnet,
    "switch_moe": switch_moe,
}
