"""Embed and load as two steps: embeddings go into Parquet files, and from there into a collection."""
