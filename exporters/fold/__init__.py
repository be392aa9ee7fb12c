"""An adapter into any ONNX file of its base."""
