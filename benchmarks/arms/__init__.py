"""The parts of the ablation (``benchmarks/ablation.py``)."""
