"""The modules of the ablation (``benchmarks/ablation.py``)."""
