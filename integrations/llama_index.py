"""LlamaIndex: an embedding for texts and images, and a retriever over an indexed collection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cocoa_embed.encoder import Encoder, Item, make_item
from cocoa_embed.errors import CocoaError, require
from cocoa_embed.images import ImageSource
from cocoa_embed.loading import load_model

require("llama_index.core", "llama-index")

from llama_index.core.base.base_retriever import BaseRetriever  # noqa: E402 - after the error that names the extra
from llama_index.core.base.embeddings.base import DEFAULT_EMBED_BATCH_SIZE, Embedding  # noqa: E402
from llama_index.core.bridge.pydantic import Field, PrivateAttr  # noqa: E402
from llama_index.core.callbacks import CallbackManager  # noqa: E402
from llama_index.core.embeddings import MultiModalEmbedding  # noqa: E402
from llama_index.core.schema import ImageType, NodeWithScore, QueryBundle  # noqa: E402
from llama_index.core.vector_stores.utils import metadata_dict_to_node  # noqa: E402

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from cocoa_embed.integrations.qdrant import Hit


class CocoaEmbedding(MultiModalEmbedding):
    """A multimodal SentenceTransformer as a LlamaIndex embedding of texts and images in one space.

    Queries get the model's query prompt, texts and images its document prompt. Threads and tasks may share it; to share
    one model between several embeddings, give each the same :class:`~cocoa_embed.encoder.Encoder`.
    """

    device: str | None = Field(default=None, description="The torch device; None takes the fastest there is.")
    _encoder: Encoder = PrivateAttr()

    def __init__(
        self,
        model_name: str | Path = "cocoa-qwen2vl",
        *,
        model: SentenceTransformer | Encoder | None = None,
        device: str | None = None,
        embed_batch_size: int = DEFAULT_EMBED_BATCH_SIZE,
        callback_manager: CallbackManager | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the model, or take a loaded one.

        :param model_name: The folder or hub name of a SentenceTransformer; with ``model``, only what to call it.
        :param model: A loaded model.
        :param device: The torch device, for a model that is to be loaded.
        :param embed_batch_size: Texts or images to embed at once.
        :param callback_manager: LlamaIndex's.
        :param kwargs: The other fields of LlamaIndex's ``BaseEmbedding``.
        :raises CocoaError: If the model cannot be loaded, or embeds no images.
        """
        super().__init__(
            model_name=str(model_name),
            device=device,
            embed_batch_size=embed_batch_size,
            callback_manager=callback_manager or CallbackManager([]),
            **kwargs,
        )
        if not isinstance(model, Encoder):
            model = Encoder(load_model(model_name, device) if model is None else model, str(model_name))
        model.require_images()
        self._encoder = model

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "CocoaEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encoder.embed_queries([{"text": query}])[0].tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embed_documents([{"text": text} for text in texts])

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return self._embed_documents([make_item(image=image) for image in img_file_paths])

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_image_embeddings, img_file_paths)

    def _embed_documents(self, items: Sequence[Item]) -> list[Embedding]:
        return self._encoder.embed_documents(items, batch_size=self.embed_batch_size).tolist()


class ImageSearcher(Protocol):
    """What a retriever asks: :class:`~cocoa_embed.integrations.qdrant.QdrantIndexer`, or anything that searches so."""

    def search(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
    ) -> list[Hit]:
        """Return the images nearest to a text, to an image, or to both, best first."""


class CocoaRetriever(BaseRetriever):
    """Retrieve the images of an indexed collection by text, by image (``QueryBundle.image_path``), or by both."""

    def __init__(
        self,
        indexer: ImageSearcher,
        similarity_top_k: int = 10,
        *,
        score_threshold: float | None = None,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        """Retrieve from a collection.

        :param indexer: What searches: a :class:`~cocoa_embed.integrations.qdrant.QdrantIndexer`, usually.
        :param similarity_top_k: The most nodes to return.
        :param score_threshold: The least cosine of a node.
        :param callback_manager: LlamaIndex's.
        :param verbose: LlamaIndex's.
        """
        super().__init__(callback_manager=callback_manager, verbose=verbose)
        self._indexer = indexer
        self.similarity_top_k = similarity_top_k
        self.score_threshold = score_threshold

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._indexer.search(
            "\n".join(query_bundle.embedding_strs) or None,
            query_bundle.image_path,
            limit=self.similarity_top_k,
            score_threshold=self.score_threshold,
        )
        return [to_node(hit) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def to_node(hit: Hit) -> NodeWithScore:
    """Return a hit as LlamaIndex's node: an ``ImageNode`` with ``image_path`` and, as metadata, the payload.

    :raises CocoaError: If the point was written by something that LlamaIndex cannot read.
    """
    try:
        return NodeWithScore(node=metadata_dict_to_node(hit.payload), score=hit.score)
    except ValueError as error:
        raise CocoaError(
            f"point {hit.id} of the collection has no LlamaIndex node in its payload; index the images with cocoa-embed"
        ) from error
