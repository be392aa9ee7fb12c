"""ONNX and TensorRT exporters."""
