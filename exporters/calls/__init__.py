"""What a model takes and returns, and calling it."""
