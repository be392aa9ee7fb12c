"""One block of Llama-7B, of ViT-L and of DiT-XL, in plain PyTorch: the machine may have no other library.

Random weights, norms moved off 1: a step costs the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _attention(qkv: Tensor, heads: int, causal: bool = False) -> Tensor:
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class LlamaBlock(nn.Module):
    """RMSNorm, q, k, v and o, SwiGLU."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.o(_attention(torch.cat([self.q(h), self.k(h), self.v(h)], -1), self.heads, causal=True))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class ViTBlock(nn.Module):
    """LayerNorm, one linear for q, k and v, GELU."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(_attention(self.qkv(self.norm1(x)), self.heads))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DiTBlock(ViTBlock):
    """The same with norms that are scaled and gated by a condition, which is fixed here."""

    condition: Tensor

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__(width, heads, inner)
        self.adaln = nn.Linear(width, 6 * width)
        self.register_buffer("condition", torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(self.condition)).chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.proj(_attention(self.qkv(h), self.heads))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(h)))


@dataclasses.dataclass(frozen=True)
class Block:
    """A block and its input.

    Attributes:
        make: builds it from width, heads and inner width.
        sizes: width, heads, inner width.
        batch, tokens: of the input [batch, tokens, width].
    """

    make: Callable[[int, int, int], nn.Module]
    sizes: tuple[int, int, int]
    batch: int
    tokens: int

    def build(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
        """The frozen block and an input that requires a gradient."""
        torch.manual_seed(0)
        module = self.make(*self.sizes)
        with torch.no_grad():
            for one in module.modules():
                if "Norm" in type(one).__name__:
                    for parameter in one.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        x = torch.randn(self.batch, self.tokens, self.sizes[0])
        return module.to(device, dtype).requires_grad_(False), x.to(device, dtype).requires_grad_()

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """Rows, in_features and out_features of its linears, each shape once."""
        with torch.device("meta"):
            module = self.make(*self.sizes)
        found = [one for name, one in module.named_modules() if isinstance(one, nn.Linear) and name != "adaln"]
        return list(dict.fromkeys((self.batch * self.tokens, one.in_features, one.out_features) for one in found))


BLOCKS = {
    "Llama-7B": Block(LlamaBlock, (4096, 32, 11008), 2, 2048),
    "ViT-L": Block(ViTBlock, (1024, 16, 4096), 32, 197),
    "DiT-XL": Block(DiTBlock, (1152, 16, 4608), 32, 256),
}
SMALL = {
    "Llama-7B": Block(LlamaBlock, (32, 4, 48), 2, 8),
    "ViT-L": Block(ViTBlock, (32, 4, 64), 2, 9),
    "DiT-XL": Block(DiTBlock, (32, 4, 64), 2, 9),
}
