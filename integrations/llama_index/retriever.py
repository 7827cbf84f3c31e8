"""A LlamaIndex retriever over an indexed collection of images."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores import MetadataFilters

from cocoa_embed.integrations.llama_index.filters import to_condition
from cocoa_embed.integrations.llama_index.nodes import to_node

if TYPE_CHECKING:
    from qdrant_client import models

    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer


class CocoaRetriever(BaseRetriever):
    """Retrieve the images of a collection by text, by image (``QueryBundle.image_path``), or by both.

    The collection may be on a server, in a local folder, or in Qdrant Edge; LlamaIndex's own store does not read Edge.
    Several texts in ``custom_embedding_strs`` are one query, joined by newlines. An ``embedding`` in the query is
    ignored: LlamaIndex's retrievers leave the embeddings of other models there.
    """

    def __init__(
        self,
        indexer: QdrantIndexer,
        similarity_top_k: int = 10,
        *,
        filters: MetadataFilters | models.Filter | None = None,
        score_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Retrieve from a collection.

        :param indexer: The collection and its model.
        :param similarity_top_k: The maximum number of nodes.
        :param filters: Conditions on the payload, as LlamaIndex's or Qdrant's filters.
        :param score_threshold: The minimum cosine similarity of a node.
        :param kwargs: Options of LlamaIndex's ``BaseRetriever``, such as ``callback_manager``.
        :raises UsageError: If a filter's value does not fit its operator or its field.
        """
        super().__init__(**kwargs)
        self._indexer = indexer
        self.similarity_top_k = similarity_top_k
        self.score_threshold = score_threshold
        self.query_filter = to_condition(filters) if isinstance(filters, MetadataFilters) else filters

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._indexer.search(
            "\n".join(query_bundle.embedding_strs) or None,
            query_bundle.image_path,
            limit=self.similarity_top_k,
            score_threshold=self.score_threshold,
            query_filter=self.query_filter,
        )
        return [to_node(hit) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
