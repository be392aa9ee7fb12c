"""Vectors and weights as numbers: folding, fingerprints, adapter files, safe writing."""
