"""Learning rates, of the methods that the demo shows."""

from __future__ import annotations

from onelora_compile.examples.sentences.methods import BITFIT, FULL, HEAD_ONLY, LORA, ONE_LORA
from onelora_compile.examples.sentences.train import HEAD_RATE

# The best on the validation sentences of films, seed 0, 80 steps:
# `python -m benchmarks.eval --tasks films`, each run in benchmarks/results/eval/films.
RATES = {
    HEAD_ONLY: HEAD_RATE,
    BITFIT: 3e-3,
    ONE_LORA: 3e-3,
    LORA: 1e-2,
    FULL: 1e-4,
}
