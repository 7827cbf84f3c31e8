"""A warm process over one index and one model: search, thumbnails and embeddings over HTTP."""
