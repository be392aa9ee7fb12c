"""Models in ONNX Runtime: running, comparing, adapters in its formats."""
