"""Index image collections into Qdrant and search them."""

from cocoa_embed.integrations.qdrant.indexer import IndexSummary, QdrantIndexer

__all__ = ["IndexSummary", "QdrantIndexer"]
