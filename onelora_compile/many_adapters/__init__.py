"""Many adapters on one base: see README.md."""
