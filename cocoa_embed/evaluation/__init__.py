"""Scores models on MMEB-V1 and on pairs of queries and documents."""

BATCH_TOKENS = 16384
"""The default of the most tokens in a batch, by ``embed.estimated_tokens``."""
