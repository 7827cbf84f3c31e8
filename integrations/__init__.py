"""Adapters that put an embedding model into a retrieval stack."""
