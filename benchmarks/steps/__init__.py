"""The modules of ``benchmarks/train_step.py``."""
