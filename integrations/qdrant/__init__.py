"""Index image collections into Qdrant and search them."""

from cocoa_embed.integrations.qdrant.index_summary import IndexSummary
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores.base import Hit

__all__ = ["Hit", "IndexSummary", "QdrantIndexer"]
