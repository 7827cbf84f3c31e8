"""The training loop that all stages share: trainer, checkpoints, processes, logging."""
