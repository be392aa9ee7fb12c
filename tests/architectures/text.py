"""Text models of transformers: encoders, decoders, encoder-decoders, and three that do not use nn.Linear plainly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from architectures.outputs import settle

VOCABULARY = 64


def token_inputs(**more):
    ids = torch.randint(4, VOCABULARY, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def encoder_config(config, **more):
    return config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **more,
    )


def decoder_config(config, **more):
    common = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "attention_dropout": 0.0,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    return config(**{**common, **more})


def encoder(kind, **more):
    import transformers

    torch.manual_seed(0)
    config = encoder_config(getattr(transformers, f"{kind}Config"), **more)
    return settle(getattr(transformers, f"{kind}ForSequenceClassification")(config)), token_inputs()


def decoder(kind, **more):
    import transformers

    torch.manual_seed(0)
    config = decoder_config(getattr(transformers, f"{kind}Config"), **more)
    return settle(getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)), token_inputs()


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(
        dim=48,
        n_layers=2,
        n_heads=3,
        hidden_dim=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.1,
    )
    return settle(DistilBertForSequenceClassification(config)), token_inputs()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=48,
        n_layer=2,
        n_head=3,
        vocab_size=VOCABULARY,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return settle(GPT2LMHeadModel(config)), token_inputs()


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_dim=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.1,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return settle(OPTForCausalLM(config)), token_inputs()


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        hidden_size=48,
        n_layer=2,
        n_head=3,
        vocab_size=VOCABULARY,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.1,
        use_cache=False,
    )
    return settle(BloomForCausalLM(config)), token_inputs()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=48,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        vocab_size=VOCABULARY,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
    )
    inputs = token_inputs(decoder_input_ids=torch.randint(4, VOCABULARY, (2, 6)))
    return settle(T5ForConditionalGeneration(config)), inputs


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0.0,
        init_std=0.1,
        use_cache=False,
    )
    inputs = token_inputs(decoder_input_ids=torch.randint(4, VOCABULARY, (2, 6)))
    return settle(BartForConditionalGeneration(config)), inputs


def xlnet():
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    config = XLNetConfig(
        d_model=48,
        n_layer=2,
        n_head=3,
        d_inner=96,
        vocab_size=VOCABULARY,
        dropout=0.0,
        initializer_range=0.1,
        use_mems_eval=False,
        use_mems_train=False,
    )
    inputs = token_inputs()
    types = torch.zeros_like(inputs["input_ids"])
    types[:, 5:] = 1
    return settle(XLNetLMHeadModel(config)), {**inputs, "token_type_ids": types, "use_mems": False}


def mamba():
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        vocab_size=VOCABULARY,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    # Not MambaForCausalLM: it casts its logits to float32, whatever the model's dtype.
    return settle(MambaModel(config)), token_inputs()


WINDOWS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": False,
    "position_biased_input": False,
    "pooler_dropout": 0.0,
}
TEXT: dict[str, Callable] = {
    "bert": partial(encoder, "Bert"),
    "roberta": partial(encoder, "Roberta"),
    "albert": partial(encoder, "Albert", embedding_size=32, classifier_dropout_prob=0.0),
    "distilbert": distilbert,
    "electra": partial(encoder, "Electra", embedding_size=32),
    "deberta_v2": partial(encoder, "DebertaV2", **DEBERTA),
    "mpnet": partial(encoder, "MPNet"),
    "gpt2": gpt2,
    "gpt_neox": partial(decoder, "GPTNeoX", hidden_dropout=0.0),
    "opt": opt,
    "llama": partial(decoder, "Llama"),
    "mistral": partial(decoder, "Mistral", sliding_window=4),
    "qwen2": partial(decoder, "Qwen2"),
    "qwen3": partial(decoder, "Qwen3", head_dim=16),
    "gemma2": partial(decoder, "Gemma2", **WINDOWS),
    "gemma3_text": partial(decoder, "Gemma3Text", **WINDOWS),
    "phi3": partial(decoder, "Phi3", resid_pdrop=0.0, embd_pdrop=0.0, original_max_position_embeddings=32),
    "falcon": partial(decoder, "Falcon", ffn_hidden_size=96, hidden_dropout=0.0, bias=False, multi_query=True),
    "bloom": bloom,
    "t5": t5,
    "bart": bart,
    "xlnet": xlnet,
    "mamba": mamba,
}
