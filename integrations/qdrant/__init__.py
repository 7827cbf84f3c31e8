"""Index image collections into Qdrant and search them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import Hit, IndexSummary, QdrantIndexer

__all__ = ["Hit", "IndexSummary", "QdrantIndexer"]


def __getattr__(name: str) -> object:
    """Import the indexer at first use: filters and payloads need neither torch nor Qdrant's client."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cocoa_embed.integrations.qdrant.indexer"), name)
