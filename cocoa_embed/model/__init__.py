"""The model: load a backbone, make it bidirectional, export it, and say what it is."""
