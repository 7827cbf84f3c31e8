"""The model: load a backbone, make it bidirectional, export it, and identify it."""
