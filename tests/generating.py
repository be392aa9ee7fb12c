"""Small decoders with a tokenizer, and what eager generates from them."""

import tokenizers
import torch
import transformers

from onelora_compile.testing import perturb_norms

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
}
PROMPT, TOKENS = [5, 17, 33, 40], 8


def base_in(folder, kind, **more):
    """A base and its tokenizer, saved as transformers does; `more` goes into its configuration."""
    torch.manual_seed(0)
    # As in a real model no layer is as wide as the vocabulary: genai's builder takes such a layer for the head.
    config = CONFIGS[kind](
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=80, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, **more,
    )  # fmt: skip
    base = perturb_norms(transformers.AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # tokens of a random model lie close together
    base.save_pretrained(folder)
    words = tokenizers.models.WordLevel(
        {f"t{number}": number for number in range(60)}, unk_token="t0"
    )  # Qwen adds its own
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="t0")
    tokenizer.save_pretrained(folder)
    return base


def call(model):
    """Arguments of a step with a past, for an exporter."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 64, (2, 3)), past_key_values=cache)
    mask = torch.ones(2, 5, dtype=torch.long)
    return {"input_ids": torch.randint(3, 64, (2, 2)), "past_key_values": cache, "attention_mask": mask}


@torch.no_grad()
def greedy(model, ends=(), prompt=PROMPT):
    """The tokens after the prompt, without the end tokens, which a runtime does not take before its least length."""
    tokens = list(prompt)
    for _ in range(TOKENS):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[list(ends)] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
