"""A vision transformer for 8x8 images, small enough to train in seconds on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2
TOKENS = 16  # of an 8x8 image


class Block(nn.Module):
    """Pre-norm transformer block with packed query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] to tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention over the tokens."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, batch, heads, tokens, *]
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(y.transpose(1, 2).flatten(2))


class DigitViT(nn.Module):
    """Images [batch, 8, 8] to logits [batch, 10].

    The patch embedding is a linear over the 4 pixels of a patch, so that it can be adapted like any other linear.
    """

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(torch.randn(TOKENS, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits."""
        patches = images.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3)  # [batch, 4, 4, 2, 2]
        x = self.embed(patches.flatten(3).flatten(1, 2)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
