"""Storage backends of a collection: local mode, Qdrant Edge, a server."""
