"""Audio models of transformers, on short waveforms or small spectrograms."""

from __future__ import annotations

import torch

from architectures.outputs import settle


def waveform_config(config):
    return config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        vocab_size=24,
        conv_dim=(16, 16),
        conv_kernel=(8, 4),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        initializer_range=0.1,
    )


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    return settle(Wav2Vec2ForCTC(waveform_config(Wav2Vec2Config))), {"input_values": torch.randn(2, 160)}


def hubert():
    from transformers import HubertConfig, HubertForCTC

    torch.manual_seed(0)
    return settle(HubertForCTC(waveform_config(HubertConfig))), {"input_values": torch.randn(2, 160)}


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        dropout=0.0,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        use_cache=False,
    )
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(4, 64, (2, 6))}
    return settle(WhisperForConditionalGeneration(config)), inputs


def ast():
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(  # type: ignore[call-arg]  # takes what its base does, and does not declare it
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        patch_size=8,
        time_stride=6,
        frequency_stride=6,
        max_length=32,
        num_mel_bins=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=5,
    )
    return settle(ASTForAudioClassification(config)), {"input_values": torch.randn(2, 32, 16)}


AUDIO = {"wav2vec2": wav2vec2, "hubert": hubert, "whisper": whisper, "ast": ast}
