"""GGUF files of models of transformers, with rows in llama.cpp's order by a formula of their own: not the package's."""

from typing import Any

import gguf
import torch
import transformers

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 96, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "max_position_embeddings": 64,
}
GPT2 = {
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    **{"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
}
# By llama.cpp's name: the class of the configuration, and its sizes.
CONFIGS = {
    "llama": (transformers.LlamaConfig, SIZES),
    "mistral": (transformers.MistralConfig, SIZES | {"head_dim": 24}),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "qwen3": (transformers.Qwen3Config, SIZES | {"head_dim": 24}),
    "gemma2": (transformers.Gemma2Config, SIZES | {"head_dim": 24}),
    "gemma3": (transformers.Gemma3TextConfig, SIZES | {"head_dim": 24}),
    "phi3": (transformers.Phi3Config, SIZES),
    "starcoder2": (transformers.Starcoder2Config, SIZES),
    "gpt2": (transformers.GPT2Config, GPT2),
}
# By transformers' name: those that transformers does not read, or reads by another name.
OTHERS = {
    "smollm3": (transformers.SmolLM3Config, SIZES),
    "granite": (transformers.GraniteConfig, SIZES),
    "olmo": (transformers.OlmoConfig, SIZES),
    "gemma": (transformers.GemmaConfig, SIZES | {"head_dim": 24}),
    "olmo2": (transformers.Olmo2Config, SIZES),
    "olmo3": (transformers.Olmo3Config, SIZES),
}


def model_of(kind, **sizes):
    torch.manual_seed(0)
    cls, known = (CONFIGS | OTHERS)[kind]
    return transformers.AutoModelForCausalLM.from_config(cls(**{**known, **sizes})).eval()


def arch_of(model):
    """llama.cpp's name of a model's architecture."""
    return {"mistral": "llama", "gemma3_text": "gemma3"}.get(model.config.model_type, model.config.model_type)


def interleaved(rows, heads):
    """Of each head, its two halves row by row: 0, d/2, 1, d/2 + 1, and so on."""
    size = len(rows) // heads
    order = [head * size + place // 2 + (place % 2) * (size // 2) for head in range(heads) for place in range(size)]
    return rows[order]


def write_base(model, path, kind="F32"):
    """A GGUF file that llama.cpp loads, of a Llama, a Qwen 2 or a GPT-2; linears are stored as `kind`."""
    config = model.config
    arch = arch_of(model)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, values in model.state_dict().items():
        _add(writer, model, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, model, name, values, kind):
    config = model.config
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == writer.arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    found = names.get_name(name, (".weight", ".bias"))
    if found is None or (name == "lm_head.weight" and config.tie_word_embeddings):
        assert found or "bias" in name, name  # masks of attention
        return
    if writer.arch == "llama" and (heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])):
        values = interleaved(values, heads)
    if writer.arch == "gpt2" and values.ndim == 2 and ".h." in name:
        values = values.T
    dtype = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
    data = gguf.quantize(values.float().contiguous().numpy(), dtype)
    writer.add_tensor(found, data, raw_dtype=dtype)


def tensors(path):
    """What a GGUF file holds, float32 by name."""
    read = gguf.GGUFReader(path).tensors
    return {one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)) for one in read}


def fields(path):
    """What its header says."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def write_lora(path, factors, alpha=1.0, architecture="llama", **extra):
    """A LoRA as another tool might write it, of factors by name; `extra` are further fields."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    said = {"adapter.type": "lora"} | extra
    for key, value in said.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in factors.items():
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
