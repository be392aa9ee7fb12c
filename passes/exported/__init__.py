"""Passes on exported programs: vectors folded into weights, or carried to the file."""
