"""From an adapted model to an ONNX model."""
