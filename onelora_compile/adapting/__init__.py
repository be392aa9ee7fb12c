"""Vectors on a model's linears: what is chosen, what carries them, and the way back."""
