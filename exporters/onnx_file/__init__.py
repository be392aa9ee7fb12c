"""ONNX files: reading, writing, what they say of their vectors."""
