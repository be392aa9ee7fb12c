"""Learning rates, and which methods the demo shows."""

from __future__ import annotations

from onelora_compile.examples.sentences.methods import (
    BITFIT,
    FULL,
    HEAD_ONLY,
    LORA,
    ONE_LORA,
)
from onelora_compile.examples.sentences.train import HEAD_RATE

# Of each method that the demo shows the best on the validation sentences of films, seed 0, 80 steps:
# `python -m benchmarks.eval --tasks films`, each run in benchmarks/results/eval/films. Of the others where to begin.
RATES = {
    HEAD_ONLY: HEAD_RATE,
    BITFIT: 3e-3,
    ONE_LORA: 3e-3,
    LORA: 1e-2,
    FULL: 1e-4,
}
SHOWN = (HEAD_ONLY, BITFIT, ONE_LORA, LORA, FULL)  # in the order of the table
