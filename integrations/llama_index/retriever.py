"""A LlamaIndex retriever over an indexed collection of images."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_multi_modal_retriever import MultiModalRetriever
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores import MetadataFilters

from cocoa_embed.integrations.llama_index.filters import to_condition
from cocoa_embed.integrations.llama_index.nodes import load_source, to_node
from cocoa_embed.integrations.qdrant.searching.conditions import Condition, Not, OneOf

if TYPE_CHECKING:
    from qdrant_client import models

    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

TEXT_NODES = OneOf("_node_type", ("TextNode", "Document", "IndexNode"))
"""The points of texts that LlamaIndex wrote."""


class CocoaRetriever(MultiModalRetriever):
    """Retrieve the images of a collection by text, by image (``QueryBundle.image_path``), or by both.

    The collection may be on a server, in a local folder, or in Qdrant Edge; LlamaIndex's own store does not read Edge.
    Several texts in ``custom_embedding_strs`` are one query, joined by newlines. An ``embedding`` in the query is
    ignored: LlamaIndex's retrievers leave the embeddings of other models there. It has the methods of LlamaIndex's
    ``MultiModalVectorIndexRetriever``. A pickled retriever opens its collection again at use.
    Its image nodes are ``StoredImage``s, which show a chat model image and caption, even if the image is not a file of
    its own (``report.pdf#page=3``, ``a.tar#0.jpg``, ``s3://...``).
    """

    def __init__(
        self,
        indexer: QdrantIndexer,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        image_similarity_top_k: int | None = None,
        *,
        filters: MetadataFilters | models.Filter | None = None,
        score_threshold: float | None = None,
        diversity: float | None = None,
        vectors: int = 1,
        allowed_hosts: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Retrieve from a collection.

        :param indexer: The collection and its model.
        :param similarity_top_k: The maximum number of nodes [default: 2, as LlamaIndex's].
        :param image_similarity_top_k: The same for ``text_to_image_retrieve`` and ``image_to_image_retrieve``.
        :param filters: Conditions on the payload, as LlamaIndex's or Qdrant's filters.
        :param score_threshold: The minimum cosine similarity of a node.
        :param diversity: From 0 (the nearest) to 1 (as different from each other as possible).
        :param vectors: For a model of several vectors, how many of the query's vectors rescore the best nodes.
        :param allowed_hosts: The hosts from which the images of queries and of nodes may be fetched.
        :param kwargs: Options of LlamaIndex's ``BaseRetriever``, such as ``callback_manager``.
        :raises UsageError: If a filter's value does not fit its operator or its field.
        """
        super().__init__(**kwargs)
        self._indexer = indexer
        self.similarity_top_k = similarity_top_k
        self.image_similarity_top_k = similarity_top_k if image_similarity_top_k is None else image_similarity_top_k
        self.score_threshold = score_threshold
        self.diversity = diversity
        self.vectors = vectors
        self.allowed_hosts = tuple(allowed_hosts)
        self.query_filter = to_condition(filters) if isinstance(filters, MetadataFilters) else filters

    def text_retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Retrieve the texts that LlamaIndex stored in the collection, by text."""
        return self._search(as_bundle(str_or_query_bundle), self.similarity_top_k, TEXT_NODES)

    def text_to_image_retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Retrieve images by text."""
        return self._retrieve_images(as_bundle(str_or_query_bundle))

    def image_to_image_retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Retrieve images by an image: its path, or a ``QueryBundle`` with ``image_path``."""
        query = str_or_query_bundle
        return self._retrieve_images(QueryBundle("", image_path=query) if isinstance(query, str) else query)

    async def atext_retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Do what ``text_retrieve`` does, in a thread."""
        return await asyncio.to_thread(self.text_retrieve, str_or_query_bundle)

    async def atext_to_image_retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Do what ``text_to_image_retrieve`` does, in a thread."""
        return await asyncio.to_thread(self.text_to_image_retrieve, str_or_query_bundle)

    async def aimage_to_image_retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Do what ``image_to_image_retrieve`` does, in a thread."""
        return await asyncio.to_thread(self.image_to_image_retrieve, str_or_query_bundle)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._search(query_bundle, self.similarity_top_k)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _retrieve_images(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        indexes = self._indexer.store.payload_indexes()  # None: a filter may be on any field
        is_filterable = indexes is None or TEXT_NODES.path in indexes
        found = self._search(query_bundle, self.image_similarity_top_k, *([Not(TEXT_NODES)] if is_filterable else []))
        return [each for each in found if isinstance(each.node, ImageNode)]

    async def _aretrieve_images(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve_images, query_bundle)

    _text_to_image_retrieve = _image_to_image_retrieve = _retrieve_images
    _atext_to_image_retrieve = _aimage_to_image_retrieve = _aretrieve_images

    def _search(self, query: QueryBundle, limit: int, *conditions: Condition) -> list[NodeWithScore]:
        image = query.image_path
        hits = self._indexer.search(
            "\n".join(query.embedding_strs) or None,
            None if image is None else load_source(image, self.allowed_hosts),
            limit=limit,
            score_threshold=self.score_threshold,
            query_filter=[*conditions, *([] if self.query_filter is None else [self.query_filter])],
            diversity=self.diversity,
            vectors=self.vectors,
        )
        return [to_node(hit, self.allowed_hosts) for hit in hits]


def as_bundle(query: QueryType) -> QueryBundle:
    """Return a query as a bundle."""
    return QueryBundle(query) if isinstance(query, str) else query
