"""An ONNX model in an older opset."""
