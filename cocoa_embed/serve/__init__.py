"""A server that keeps one index and one model loaded: search, thumbnails and embeddings over HTTP."""
