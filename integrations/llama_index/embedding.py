"""LlamaIndex: an embedding for texts and images, and a retriever over an indexed collection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cocoa_embed.encode.encoder import Encoder, ModelInput, make_input
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, ImageError, UsageError, one_line, printable, require
from cocoa_embed.images.load import ImageSource
from cocoa_embed.integrations.llama_index.nodes import split_by_image, to_node
from cocoa_embed.model.loading import is_hub_name

require("llama_index.core", "llama-index")

from llama_index.core.base.base_retriever import BaseRetriever  # noqa: E402 - after the error that names the extra
from llama_index.core.base.embeddings.base import DEFAULT_EMBED_BATCH_SIZE, Embedding  # noqa: E402
from llama_index.core.bridge.pydantic import Field, PrivateAttr  # noqa: E402
from llama_index.core.callbacks import CallbackManager  # noqa: E402
from llama_index.core.embeddings import MultiModalEmbedding  # noqa: E402
from llama_index.core.schema import BaseNode, ImageType, NodeWithScore, QueryBundle  # noqa: E402
from llama_index.core.vector_stores import MetadataFilters  # noqa: E402

if TYPE_CHECKING:
    from qdrant_client import models
    from sentence_transformers import SentenceTransformer

    from cocoa_embed.integrations.qdrant.indexer import Hit

Input = TypeVar("Input")
Output = TypeVar("Output")

DEFAULT_MODEL = "cocoa-qwen2vl"
THREADS = 2
"""Threads that embed what is stored, asynchronously: one is in the model while the other reads images."""


class CocoaEmbedding(MultiModalEmbedding):
    """A multimodal SentenceTransformer as a LlamaIndex embedding of texts and images in one space.

    Queries get the model's query prompt, texts and images its document prompt. Threads and tasks may share it; to share
    one model between several embeddings, give each the same ``Encoder``. A copy shares the
    model. A pickled embedding is its settings: another process loads the model again, by name, when it first needs it.

    LlamaIndex's ``embeddings_cache`` goes by the text alone. It holds no images, and gives a query the vector of a
    stored text that reads the same: keep one cache to one model, and to models whose two prompts are equal.
    """

    device: str | None = Field(default=None, description="The torch device; None takes the fastest there is.")
    dimension: int | None = Field(default=None, gt=0, description="The length of an embedding.")
    embeddings_cache: Any | None = Field(default=None, exclude=True, description="A LlamaIndex store of embeddings.")
    _encoder: Encoder | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _threads: ThreadPoolExecutor = PrivateAttr(default_factory=lambda: ThreadPoolExecutor(THREADS, "cocoa-embedding"))

    def __init__(
        self,
        model_name: str | Path | None = None,
        *,
        model: SentenceTransformer | Encoder | None = None,
        device: str | None = None,
        dimension: int | None = None,
        embed_batch_size: int = DEFAULT_EMBED_BATCH_SIZE,
        callback_manager: CallbackManager | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the model, or take a loaded one.

        :param model_name: The folder or hub name of a SentenceTransformer, ``cocoa-qwen2vl`` by default; with
            ``model``, what to call it, and where another process finds it.
        :param model: A loaded model.
        :param device: The torch device, for a model that is to be loaded.
        :param dimension: Where to cut the embeddings of a model that was trained for it; by default they stay whole.
        :param embed_batch_size: Texts or images to embed at once.
        :param callback_manager: LlamaIndex's.
        :param kwargs: The other fields of LlamaIndex's ``BaseEmbedding``.
        :raises CocoaError: If the model cannot be loaded, or embeds no images.
        :raises UsageError: If the model's embeddings do not have that many dimensions.
        """
        if model_name is None:
            model_name = DEFAULT_MODEL if model is None else model.name if isinstance(model, Encoder) else "the model"
        super().__init__(
            model_name=str(model_name),
            device=device,
            dimension=dimension,
            embed_batch_size=embed_batch_size,
            callback_manager=callback_manager or CallbackManager([]),
            **kwargs,
        )
        if isinstance(model, Encoder):
            self._encoder = model
        elif model is not None:
            self._encoder = Encoder(model, self.model_name, dimension)
        self.encoder.require_images()
        if dimension not in (None, self.encoder.dimension):
            raise UsageError(
                f"{self.encoder.name} makes embeddings of {self.encoder.dimension} dimensions, not of {dimension};"
                " give the dimension to the Encoder that is shared"
            )
        self.dimension = self.encoder.dimension

    @property
    def encoder(self) -> Encoder:
        """The model. In an embedding that came from another process it is loaded at first use.

        :raises CocoaError: If it cannot be loaded.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = load_encoder(self.model_name, self.device, self.dimension)
            return self._encoder

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "CocoaEmbedding"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CocoaEmbedding:
        """Return a copy that shares the model."""
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, by which another process finds the model.

        :raises CocoaError: If it cannot: the embedding was made from a loaded model, and its name is that of none.
        """
        if not (Path(self.model_name).expanduser().is_dir() or is_hub_name(self.model_name)):
            raise CocoaError(
                f"the embedding cannot go to another process, which would find no model {self.model_name!r};"
                " give the folder or the hub name that the loaded model is from as model_name"
            )
        return self.to_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over settings. The model is loaded later: an error here would leave a pool of processes hanging."""
        super().__init__(**{name: value for name, value in state.items() if name != "class_name"})

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes in place, as a step of a pipeline: those that hold an image by it, the others by their text.

        :raises ImageError: If an image cannot be used.
        """
        images, texts = split_by_image(nodes)
        embeddings = self.get_image_embedding_batch([image for _, image in images], **kwargs)
        for (node, _), embedding in zip(images, embeddings, strict=True):
            node.embedding = embedding
        super().__call__(texts, **kwargs)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes in place, as a step of a pipeline: those that hold an image by it, the others by their text.

        :raises ImageError: If an image cannot be used.
        """
        images, texts = split_by_image(nodes)
        embeddings = await self.aget_image_embedding_batch([image for _, image in images], **kwargs)
        for (node, _), embedding in zip(images, embeddings, strict=True):
            node.embedding = embedding
        await super().acall(texts, **kwargs)
        return nodes

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.encoder.embed_queries([{"text": query}])[0].tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embed_documents([{"text": text} for text in texts], texts)

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return self._embed_documents([make_input(image=image) for image in img_file_paths], img_file_paths)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)  # not in line behind all that is to be stored

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await self._in_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._in_thread(self._get_text_embeddings, texts)

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return await self._in_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return await self._in_thread(self._get_image_embeddings, img_file_paths)

    async def _in_thread(self, embed: Callable[[Input], Output], inputs: Input) -> Output:
        # LlamaIndex fires all batches at once. In the loop's own threads each would read its images, only to wait with
        # them in memory for the model.
        return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, embed, inputs)

    def _embed_documents(self, items: Sequence[ModelInput], sources: Sequence[ImageSource]) -> list[Embedding]:
        """Embed what is stored.

        :param sources: What the items were made from, for errors.
        :raises CocoaError: If the model refuses an item.
        """
        try:
            return self.encoder.embed_documents(items, batch_size=self.embed_batch_size).tolist()
        except ValueError as error:
            if len(items) == 1:
                raise refusal(items[0], sources[0], one_line(error)) from error
        pairs = zip(items, sources, strict=True)  # one spoils the batch: find out which
        return [embedding for item, source in pairs for embedding in self._embed_documents([item], [source])]


class ImageSearcher(Protocol):
    """What a retriever asks: ``QdrantIndexer``, or anything that searches so."""

    def search(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        query_filter: models.Filter | None = None,
    ) -> list[Hit]:
        """Return the images nearest to a text, to an image, or to both, best first."""


class CocoaRetriever(BaseRetriever):
    """Retrieve the images of an indexed collection by text, by image (``QueryBundle.image_path``), or by both.

    The collection may be on a server, in a folder, or in Qdrant Edge; LlamaIndex's own store reads only the first two.
    A ``custom_embedding_strs`` of several texts is asked as one text of as many lines. An ``embedding`` in the query is
    passed over: LlamaIndex's retrievers leave there what their own models have made of it.
    """

    def __init__(
        self,
        indexer: ImageSearcher,
        similarity_top_k: int = 10,
        *,
        filters: MetadataFilters | models.Filter | None = None,
        score_threshold: float | None = None,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        """Retrieve from a collection.

        :param indexer: What searches: a ``QdrantIndexer``, usually.
        :param similarity_top_k: The most nodes to return.
        :param filters: What the payload of a point must hold, in LlamaIndex's words
            (``to_qdrant_filter``) or in Qdrant's.
        :param score_threshold: The least cosine of a node.
        :param callback_manager: LlamaIndex's.
        :param verbose: LlamaIndex's.
        :raises UsageError: If a filter's operator has a value that it cannot be asked with.
        """
        super().__init__(callback_manager=callback_manager, verbose=verbose)
        self._indexer = indexer
        self.similarity_top_k = similarity_top_k
        self.score_threshold = score_threshold
        self.query_filter = as_qdrant_filter(filters)

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


def as_qdrant_filter(filters: MetadataFilters | models.Filter | None) -> models.Filter | None:
    """Return filters in Qdrant's words."""
    if not isinstance(filters, MetadataFilters):
        return filters
    # Not above: it needs Qdrant's client, which an embedding does without.
    from cocoa_embed.integrations.llama_index.filters import to_qdrant_filter

    return to_qdrant_filter(filters)


def refusal(item: ModelInput, source: ImageSource, reason: str) -> CocoaError:
    """Return the error for a text or an image that the model does not take."""
    if "image" not in item:
        return CocoaError(f"the text {source!a:.80} cannot be embedded ({reason})")
    name = printable(source) if isinstance(source, (str, Path)) else "an image that was given as such"
    return ImageError(name, f"cannot be embedded ({reason})")
