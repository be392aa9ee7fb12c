"""export_onnx where what runs depends on gradients: attention has kernels for training with another layout."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors


class Attention(nn.Module):
    """As SAM's: a mask with a parameter in it, which only some kernels derive, and a reshape that may be a view."""

    def __init__(self, heads=2, size=16):
        super().__init__()
        self.heads, self.slope = heads, nn.Parameter(torch.ones(()))
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        batch, tokens, size = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = self.slope * torch.arange(tokens).expand(batch, self.heads, tokens, tokens)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, size))


def attention():
    return Attention().eval(), torch.randn(2, 12, 16)


def sam():
    from transformers import SamVisionConfig, SamVisionModel

    sizes: dict[str, Any] = {"hidden_size": 32, "output_channels": 16, "mlp_dim": 64, "image_size": 32, "patch_size": 4}
    layers: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window_size": 3,
        "global_attn_indexes": [1],
    }
    return SamVisionModel(SamVisionConfig(**sizes, **layers, num_pos_feats=8)).eval(), torch.randn(1, 3, 32, 32)


CASES = [(attention, mode) for mode in ("base", "fold", "load", "input")] + [(sam, "input")]


@pytest.mark.parametrize(("made", "mode"), CASES)
def test_a_model_exports_also_where_its_base_is_trained(made, mode, tmp_path):
    torch.manual_seed(0)
    base, x = made()
    model = base if mode == "base" else fill_vectors(onelora.adapt(copy.deepcopy(base)))
    model.requires_grad_(True)
    report = export_onnx(model, (x,), tmp_path / "a.onnx", adapters="fold" if mode == "base" else mode)
    assert report.error is not None
    assert report.error < 1e-5
