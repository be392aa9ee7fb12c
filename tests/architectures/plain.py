"""Models in plain torch: the modules of torch.nn, and linears written by hand on bare parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from architectures.bare_parameters import EinsumLinear, FusedBiasViT, MatmulProjection, PackedSlices, SwitchMoE
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
