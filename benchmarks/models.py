"""The models that benchmarks run: real architectures at a size that two CPU cores can train, and the methods on them.

Width 384, 6 blocks, about 512 tokens in a batch.  Random weights, norms perturbed: a step costs the same.
Each model comes with inputs of which one requires a gradient, so that the frozen base has a backward too: it is the
floor that every method stands on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import perturb_norms

WIDTH, DEPTH, HEADS, BATCH, TOKENS = 384, 6, 6, 8, 64

Inputs = dict[str, Any]


def vit() -> tuple[nn.Module, Inputs]:
    """A vision transformer."""
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    config = ViTConfig(**sizes, intermediate_size=4 * WIDTH, image_size=128, patch_size=16)
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(BATCH, 3, 128, 128)}


def bert() -> tuple[nn.Module, Inputs]:
    """A text encoder."""
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    config = BertConfig(**sizes, intermediate_size=4 * WIDTH, vocab_size=1000)
    return BertModel(config, add_pooling_layer=False), {"inputs_embeds": torch.randn(BATCH, TOKENS, WIDTH)}


def llama() -> tuple[nn.Module, Inputs]:
    """A text decoder with grouped queries, RoPE, SwiGLU and RMSNorm."""
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    config = LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=1024, vocab_size=1000, use_cache=False)
    return LlamaModel(config), {"inputs_embeds": torch.randn(BATCH, TOKENS, WIDTH)}


def dit() -> tuple[nn.Module, Inputs]:
    """A diffusion transformer with adaptive norms."""
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, num_layers=DEPTH, sample_size=16
    )
    labels = {"timestep": torch.randint(0, 1000, (BATCH,)), "class_labels": torch.randint(0, 1000, (BATCH,))}
    return model, {"hidden_states": torch.randn(BATCH, 4, 16, 16), **labels}


def encoder() -> tuple[nn.Module, Inputs]:
    """An nn.TransformerEncoder, whose attention reads its weights without calling a module."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    return model, {"src": torch.randn(BATCH, TOKENS, WIDTH)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "vit": vit,
    "bert": bert,
    "llama": llama,
    "dit": dit,
    "encoder": encoder,
}

BASE, OWN = "frozen base", "1LoRA"


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The frozen model and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    perturb_norms(model.eval()).requires_grad_(False)
    first = next(iter(inputs))
    return model, inputs | {first: inputs[first].requires_grad_()}


def methods(name: str, base: nn.Module) -> dict[str, nn.Module]:
    """The base, 1LoRA and PEFT's rivals on the same linears; those that read weights directly have no rivals."""
    own = onelora.adapt(copy.deepcopy(base))
    if name == "encoder":
        return {BASE: base, OWN: own}
    targets: dict[str, Any] = {"target_modules": list(onelora.vectors(own))}
    configs = {
        "MiSS r=1 (PEFT)": peft.MissConfig(r=1, **targets),
        "LoRA r=1 (PEFT)": peft.LoraConfig(r=1, **targets),
        "VeRA r=256 (PEFT)": peft.VeraConfig(r=256, **targets),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rivals = {method: peft.get_peft_model(copy.deepcopy(base), config).eval() for method, config in configs.items()}
    return {BASE: base, OWN: own, **rivals}


def output(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The first tensor that the model returns."""
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else next(iter(result.values()))


def step(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """Forward, loss and backward; the optimizer is left out: it differs by the number of parameters alone."""
    x = next(iter(inputs.values()))

    def run() -> None:
        model.zero_grad()
        x.grad = None
        output(model, inputs).square().mean().backward()

    return run
