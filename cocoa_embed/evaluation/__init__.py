"""Scores models on MMEB-V1 and on pairs of queries and documents."""
