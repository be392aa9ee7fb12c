"""Quality of 1LoRA beside other methods, on pretrained models and real data: `python -m benchmarks.eval --help`."""
