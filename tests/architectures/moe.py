"""Mixture-of-experts models of transformers: routers plus experts packed in 3-D parameters."""

from __future__ import annotations

import torch

from architectures.outputs import settle
from architectures.text import decoder_config, token_inputs


def moe_config(config, **more):
    made = decoder_config(config, num_experts_per_tok=2, **more)
    # The default, grouped_mm, has no float64 kernel; "eager" loops over the experts with data-dependent shapes.
    made._experts_implementation = "batched_mm"
    return made


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return settle(MixtralForCausalLM(moe_config(MixtralConfig, num_local_experts=4))), token_inputs()


def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = moe_config(
        Qwen2MoeConfig, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64, norm_topk_prob=True
    )
    return settle(Qwen2MoeForCausalLM(config)), token_inputs()


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = moe_config(Qwen3MoeConfig, num_experts=4, moe_intermediate_size=32, head_dim=16, norm_topk_prob=True)
    return settle(Qwen3MoeForCausalLM(config)), token_inputs()


def olmoe():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    return settle(OlmoeForCausalLM(moe_config(OlmoeConfig, num_experts=4))), token_inputs()


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    config = moe_config(GptOssConfig, num_local_experts=3, head_dim=16, sliding_window=4, rope_parameters=rope)
    return settle(GptOssForCausalLM(config)), token_inputs()


MOE = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "gpt_oss": gpt_oss}
