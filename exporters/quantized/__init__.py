"""Vectors beside quantised weights and before quantised activations."""
