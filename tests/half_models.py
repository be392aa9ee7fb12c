"""Models with the trouble that half precision meets in published ones, made by scaling small ones.

Large ViTs and Llamas have a few channels of the residual stream, at a few tokens, that are thousands of times larger
than the rest ("massive activations", register tokens).  Here one channel of an early block's last product is scaled, so
the stream goes beyond 65504 there; the norms after it bring everything back to usual sizes.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
)

VIT: Any = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PIXELS = (2, 3, 28, 28)


class Outputs(nn.Module):
    """The named outputs of a model, as a tuple of tensors."""

    def __init__(self, model, *names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x):
        found = self.model(x)
        return tuple(found[name] for name in self.names)


def outlier(linear, channel, size):
    """Let one channel of what a linear gives be large."""
    with torch.no_grad():
        linear.weight[channel] *= size
        if linear.bias is not None:
            linear.bias[channel] = size
    return linear


def dinov2():
    """Register tokens of large norm, and a channel beyond float16 from the second block on."""
    model: Any = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, num_register_tokens=4, mlp_ratio=4))
    with torch.no_grad():
        model.embeddings.register_tokens.mul_(0).add_(torch.randn_like(model.embeddings.register_tokens) * 500)
    outlier(model.encoder.layer[1].mlp.fc2, 5, 90000.0)
    return Outputs(model, "last_hidden_state", "pooler_output"), torch.randn(PIXELS)


def depth_anything():
    options: Any = {**VIT, "mlp_ratio": 4, "out_indices": [1, 2, 3], "reshape_hidden_states": False}
    backbone = Dinov2Config(**options)
    model: Any = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            patch_size=14,
            reassemble_factors=[2, 1, 0.5],
            neck_hidden_sizes=[8, 16, 32],
            fusion_hidden_size=16,
            head_hidden_size=8,
        )
    )
    for module in [*model.neck.modules(), *model.head.modules()]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):  # as large as trained ones; the start's vanish
            nn.init.kaiming_uniform_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
    outlier(model.backbone.encoder.layer[0].mlp.fc2, 3, 80000.0)
    return Outputs(model, "predicted_depth"), torch.randn(PIXELS)


def swin():
    model: Any = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    outlier(model.encoder.layers[0].blocks[0].mlp.fc2, 2, 70000.0)
    return Outputs(model, "last_hidden_state", "pooler_output"), torch.randn(2, 3, 32, 32)


def siglip():
    model: Any = SiglipVisionModel(SiglipVisionConfig(**VIT, intermediate_size=64))
    outlier(model.encoder.layers[0].mlp.fc2, 7, 100000.0)
    return Outputs(model, "last_hidden_state", "pooler_output"), torch.randn(PIXELS)


def llama():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    outlier(model.model.layers[0].mlp.down_proj, 4, 3e7)
    return Outputs(model, "logits"), torch.randint(0, 64, (2, 9))


MODELS = {one.__name__: one for one in (dinov2, depth_anything, swin, siglip, llama)}


def made(name):
    """A model in evaluation mode, and its input."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.eval(), x


def copied(model):
    """A copy with its vectors, which may be merged or cast."""
    return copy.deepcopy(model)
