"""A LlamaIndex retriever over an indexed collection of images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_multi_modal_retriever import MultiModalRetriever
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores import MetadataFilters

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.llama_index.filters import to_condition
from cocoa_embed.integrations.llama_index.nodes import load_source, to_node
from cocoa_embed.integrations.qdrant.searching.conditions import Condition, Exists, Not, OneOf

if TYPE_CHECKING:
    from qdrant_client import models

    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

NODE_TYPE = "_node_type"
"""The payload key of a node's class. Only its content says whether a ``Node`` or ``Document`` is an image."""
ALWAYS_TEXTS = OneOf(NODE_TYPE, ("TextNode", "IndexNode"))
ALWAYS_IMAGES = OneOf(NODE_TYPE, ("ImageNode", "ImageDocument"))
AMBIGUOUS = OneOf(NODE_TYPE, ("Document", "Node"))
AMBIGUOUS_HITS = 256
"""How many of the nearest nodes of an ambiguous class are looked through, or as many as are asked for if more."""


class CocoaRetriever(MultiModalRetriever):
    """Retrieve the images of a collection by text, by image (``QueryBundle.image_path``), or by both.

    The collection may be on a server, in a local folder, or in Qdrant Edge; LlamaIndex's own store does not read Edge.
    Of several texts in ``custom_embedding_strs``, as of HyDE, it takes the mean of the embeddings, as LlamaIndex does.
    An ``embedding`` in the query is ignored: LlamaIndex's retrievers leave the embeddings of other models there. It has
    the methods of LlamaIndex's ``MultiModalVectorIndexRetriever``. A pickled retriever opens its collection again at
    use. Its image nodes are ``StoredImage``s, which show a chat model image and caption, even if the image is not a
    file of its own (``report.pdf#page=3``, ``a.tar#0.jpg``, ``s3://...``). The ``search`` of a subclass of
    ``QdrantIndexer`` is not called.
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
        :raises UsageError: If a filter's value does not fit its operator or its field, or ``indexer`` is not one.
        """
        from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

        if not isinstance(indexer, QdrantIndexer):
            raise UsageError(f"indexer is a {type(indexer).__name__}; give QdrantIndexer(embedding.encoder, ...)")
        if isinstance(allowed_hosts, str):
            raise UsageError(f"allowed_hosts is the text {allowed_hosts!a}; give a list, as in [{allowed_hosts!a}]")
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
        conditions = Exists(NODE_TYPE), Not(ALWAYS_IMAGES)
        return self._search(as_bundle(str_or_query_bundle), self.similarity_top_k, *conditions, keep=is_text)

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
        conditions = [Not(ALWAYS_TEXTS)] if indexes is None or NODE_TYPE in indexes else []
        return self._search(query_bundle, self.image_similarity_top_k, *conditions, keep=is_image)

    async def _aretrieve_images(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve_images, query_bundle)

    _text_to_image_retrieve = _image_to_image_retrieve = _retrieve_images
    _atext_to_image_retrieve = _aimage_to_image_retrieve = _aretrieve_images

    def _search(
        self, query: QueryBundle, limit: int, *conditions: Condition, keep: Callable[[BaseNode], bool] | None = None
    ) -> list[NodeWithScore]:
        """Return the nearest nodes.

        :param conditions: Conditions on the payload, next to those of the retriever.
        :param keep: Which nodes to return, where the conditions do not tell. If it leaves too few, the nodes of a
            certain class and those of an ambiguous one are searched separately.
        """
        from cocoa_embed.integrations.llama_index.one_query import OneQuery

        texts = [text for text in query.embedding_strs if text]
        image = None if query.image_path is None else load_source(query.image_path, self.allowed_hosts)
        searcher = OneQuery(self._indexer, texts)

        def search(size: int, *more: Condition) -> list[NodeWithScore]:
            hits = searcher.search(
                texts[0] if texts else None,
                image,
                limit=size,
                score_threshold=self.score_threshold,
                query_filter=[*conditions, *more, *([] if self.query_filter is None else [self.query_filter])],
                diversity=self.diversity,
                vectors=self.vectors,
            )
            return [to_node(hit, self.allowed_hosts) for hit in hits]

        nodes = search(limit)
        kept = [each for each in nodes if keep is None or keep(each.node)]
        if len(nodes) < limit or len(kept) == limit or not conditions:  # without them, no filter may be on the class
            return kept
        nodes = [*search(limit, Not(AMBIGUOUS)), *search(max(limit, AMBIGUOUS_HITS), AMBIGUOUS)]
        kept = [each for each in nodes if keep is None or keep(each.node)]
        return sorted(kept, key=NodeWithScore.get_score, reverse=True)[:limit]


def is_image(node: BaseNode) -> bool:
    """Return whether a node is an image."""
    return isinstance(node, ImageNode)


def is_text(node: BaseNode) -> bool:
    """Return whether a node is a text."""
    return not isinstance(node, ImageNode)


def as_bundle(query: QueryType) -> QueryBundle:
    """Return a query as a bundle."""
    return QueryBundle(query) if isinstance(query, str) else query
