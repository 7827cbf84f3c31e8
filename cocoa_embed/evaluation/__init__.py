"""Score models on MMEB-V1 and on pairs of queries and documents."""

BATCH_TOKENS = 16384
"""The default for the maximum tokens of a batch, as counted by ``embed.estimated_tokens``."""
