"""What benchmarks/train_step.py measures: the two sides, their rows, and the configs of real models."""
