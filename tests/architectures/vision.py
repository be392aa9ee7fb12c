"""Vision and vision-language models of transformers, on 32 x 32 images."""

from __future__ import annotations

import torch

from architectures.outputs import settle

# Some configs take what their base does and do not declare it: hence the call-arg that is ignored.


def image(size: int = 32):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def vit_config(config, **more):
    return config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **more,
    )


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return settle(ViTForImageClassification(vit_config(ViTConfig, intermediate_size=96, num_labels=5))), image()


def deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    config = vit_config(DeiTConfig, intermediate_size=96, num_labels=5)
    return settle(DeiTForImageClassificationWithTeacher(config)), image()


def beit():
    from transformers import BeitConfig, BeitForImageClassification

    torch.manual_seed(0)
    config = vit_config(
        BeitConfig,
        intermediate_size=96,
        num_labels=5,
        layer_scale_init_value=1.0,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
        drop_path_rate=0.0,
    )
    return settle(BeitForImageClassification(config)), image()


def dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    config = vit_config(Dinov2Config, mlp_ratio=2, num_labels=5, layerscale_value=1.0, drop_path_rate=0.0)
    return settle(Dinov2ForImageClassification(config)), image()


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(  # type: ignore[call-arg]
        image_size=32,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        initializer_range=0.1,
        num_labels=5,
    )
    return settle(SwinForImageClassification(config)), image()


def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(  # type: ignore[call-arg]
        hidden_sizes=[16, 32],
        depths=[1, 2],
        num_stages=2,
        patch_size=4,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
        initializer_range=0.1,
        num_labels=5,
    )
    return settle(ConvNextForImageClassification(config)), image()


def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(  # type: ignore[call-arg]
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        initializer_range=0.1,
        num_labels=5,
    )
    return settle(SegformerForSemanticSegmentation(config)), image()


def two_towers():
    tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    text = {**tower, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 63}
    return {"text_config": text, "vision_config": {**tower, "image_size": 32, "patch_size": 8}}


def image_and_text():
    ids = torch.randint(4, 63, (2, 9))
    ids[:, -1] = 63
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image()}


def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return settle(CLIPModel(CLIPConfig(**two_towers(), projection_dim=32))), image_and_text()


def siglip():
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    return settle(SiglipModel(SiglipConfig(**two_towers()))), image_and_text()


def detr():
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(  # type: ignore[call-arg]
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(  # type: ignore[call-arg]
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=6,
        dropout=0.0,
        init_std=0.1,
        num_labels=5,
    )
    return settle(DetrForObjectDetection(config)), {**image(), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}


def depth_anything():
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = vit_config(
        Dinov2Config,
        mlp_ratio=2,
        layerscale_value=1.0,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        initializer_range=0.1,
        reassemble_hidden_size=48,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[16, 24],
        fusion_hidden_size=16,
        head_in_index=-1,
        head_hidden_size=8,
    )
    return settle(DepthAnythingForDepthEstimation(config)), image()


VISION = {
    "vit": vit,
    "deit": deit,
    "beit": beit,
    "dinov2": dinov2,
    "swin": swin,
    "convnext": convnext,
    "segformer": segformer,
    "clip": clip,
    "siglip": siglip,
    "detr": detr,
    "depth_anything": depth_anything,
}
