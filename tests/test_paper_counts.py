"""The numbers that 1LoRA trains are those of the paper's tables, on models without memory."""

from typing import Any

import pytest
import torch

import onelora_compile as onelora

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}


def llama(kind="Llama", **sizes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{"num_key_value_heads": sizes["num_attention_heads"]} | sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def encoder(kind, **sizes):
    import transformers

    options = {} if kind in ("Dinov2", "GPT2") else {"add_pooling_layer": False}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes), **options)


def depth_anything(**sizes):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    options: dict[str, Any] = {"out_indices": [-4, -3, -2, -1], "reshape_hidden_states": False, "image_size": 518}
    backbone = Dinov2Config(**sizes, **options)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=backbone.hidden_size)
    )


def dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(out_channels=8)  # noise and its variance


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768)


THREE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
EIGHT = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8}
QV, ATTENTION = ["q_proj", "v_proj"], ["to_q", "to_k", "to_v", "to_out.0"]
COUNTS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "LLaMA-2-7B": (lambda: llama(**LLAMA), {}, 1_359_872),
    "LLaMA-2-7B, q and v": (lambda: llama(**LLAMA), {"target_modules": QV}, 262_144),
    "LLaMA-2-7B, q, k and v": (lambda: llama(**LLAMA), {"target_modules": [*QV, "k_proj"]}, 393_216),
    "LLaMA-2-13B": (
        lambda: llama(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
        {},
        2_129_920,
    ),
    "Llama-3-8B": (lambda: llama(vocab_size=128256, **EIGHT), {}, 1_376_256),
    "Mistral-7B": (lambda: llama("Mistral", **EIGHT), {}, 1_376_256),
    "Llama-3.2-3B": (lambda: llama(num_key_value_heads=8, **THREE), {}, 774_144),
    "Llama-3.2-3B, q and v": (lambda: llama(num_key_value_heads=8, **THREE), {"target_modules": QV}, 114_688),
    "Llama-3.2-1B": (
        lambda: llama(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        {},
        376_832,
    ),
    "ViT-B/16": (lambda: encoder("ViT"), {}, 82_944),
    "BERT-base": (lambda: encoder("Bert"), {}, 82_944),
    "GPT-2": (lambda: encoder("GPT2"), {}, 82_944),
    "ViT-L/16": (lambda: encoder("ViT", intermediate_size=4096, **LARGE), {}, 221_184),
    "DINOv2 ViT-S/14": (lambda: encoder("Dinov2", **SMALL), {}, 41_472),
    "DINOv2 ViT-B/14": (lambda: encoder("Dinov2"), {}, 82_944),
    "DINOv2 ViT-L/14": (lambda: encoder("Dinov2", **LARGE), {}, 221_184),
    "DepthAnything-V2-S": (lambda: depth_anything(**SMALL), {}, 41_472),
    "DepthAnything-V2-B": (lambda: depth_anything(), {}, 82_944),
    "DepthAnything-V2-L": (lambda: depth_anything(**LARGE), {}, 221_184),
    # The paper leaves out what embeds the timestep.
    "DiT-XL/2": (dit, {"exclude_modules": r".*timestep_embedder\..*"}, 486_176),
    "Stable Diffusion 1.5, all linears": (unet, {}, 234_880),
    "Stable Diffusion 1.5, attention": (unet, {"target_modules": ATTENTION}, 99_840),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_trained_numbers(name):
    build, options, expected = COUNTS[name]
    with torch.device("meta"):
        model = build()
    onelora.adapt(model, onelora.OneLoRAConfig(**options))
    assert onelora.summary(model).vector_parameters == expected
    assert sum(parameter.numel() for parameter in onelora.trainable_parameters(model)) == expected
