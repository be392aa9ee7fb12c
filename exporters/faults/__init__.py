"""Graphs that a release of TensorRT computes wrong, rewritten to the same function."""
