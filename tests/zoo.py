"""Small random-weight instances of real architectures, norms perturbed, with an example input each."""

from __future__ import annotations

import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import perturb_norms


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    """A plain nn.Module vision transformer on [batch, 16, 12] patches."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 3, classes: int = 5):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6, bias), nn.Linear(6, 7, bias), nn.Linear(6, 7, bias)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h) + self.c(h)


def tiny_vit():
    torch.manual_seed(0)
    return perturb_norms(TinyViT()).eval(), {"x": torch.randn(3, 16, 12)}


def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=16, patch_size=4
    )
    return perturb_norms(ViTForImageClassification(config)).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=64)
    ids = torch.randint(0, 64, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return perturb_norms(BertForSequenceClassification(config)).eval(), inputs


def llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=64,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    ids = torch.randint(0, 64, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return perturb_norms(LlamaForCausalLM(config)).eval(), inputs


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=64, n_positions=32, use_cache=False)
    ids = torch.randint(0, 64, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return perturb_norms(GPT2LMHeadModel(config)).eval(), inputs


MODELS = {"tiny_vit": tiny_vit, "hf_vit": hf_vit, "bert": bert, "llama": llama, "gpt2": gpt2}

# How many linears the default configuration adapts: 4 per plain block + embed + head; 6 per hf block;
# bert also adapts its pooler; llama 7 per block; gpt2 4 Conv1D per block. Heads of transformers models stay.
SITES = {"tiny_vit": 10, "hf_vit": 12, "bert": 13, "llama": 14, "gpt2": 8}


def train(model, inputs, steps=3):
    """A few steps of everything that is trained."""
    optimizer = torch.optim.AdamW(onelora.trainable_parameters(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits(model(**inputs)).square().mean().backward()
        optimizer.step()


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits
