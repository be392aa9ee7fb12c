"""Everything that a GPU can prove: see README.md."""
