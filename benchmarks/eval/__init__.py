"""Quality of 1LoRA beside other methods, on pretrained models and real data: `python -m benchmarks.eval --help`.

tasks (sentences, pronunciations, digits) x methods -> training (one run) -> stages (rates on validation data, then the
test, once) -> store (one JSON a run) -> tables, in the page of the documentation.
"""
