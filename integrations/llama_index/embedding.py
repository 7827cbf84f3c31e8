"""A multimodal SentenceTransformer as a LlamaIndex embedding."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import BaseNode, ImageType
from llama_index.core.utils import iter_batch

from cocoa_embed.encode.encoder import Encoder, ModelInput, make_input
from cocoa_embed.encode.load import load_encoder, require_findable
from cocoa_embed.errors import CocoaError, ImageError, UsageError, one_line, printable
from cocoa_embed.images.load import ImageSource
from cocoa_embed.integrations.llama_index.nodes import image_of, load_source, refuse_binary, text_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Input = TypeVar("Input")
Output = TypeVar("Output")
Illustrated: TypeAlias = tuple[BaseNode, ImageType]
"""A node with its image."""

DEFAULT_MODEL = "cocoa-qwen2vl"
THREADS = 2
"""Threads for asynchronous embedding of documents: one runs the model while the other reads images."""


class CocoaEmbedding(MultiModalEmbedding):
    """A multimodal SentenceTransformer as a LlamaIndex embedding of texts and images in one space.

    Queries get the model's query prompt, texts and images its document prompt. Threads and tasks may share an
    embedding, and several embeddings an ``Encoder``. A copy shares the model. A pickled embedding holds only its
    settings: another process loads the model by name when it first needs it.

    The keys of LlamaIndex's ``embeddings_cache`` are texts. It holds no images, and a query gets the vector of a stored
    text that is equal: use a cache for one model only, and only if its two prompts are equal.
    """

    device: str | None = Field(default=None, description="The torch device [default: the fastest].")
    dimension: int | None = Field(default=None, gt=0, description="The length of an embedding.")
    allowed_hosts: list[str] = Field(default_factory=list, description="Hosts from which images may be fetched.")
    trust_remote_code: bool = Field(default=False, description="Whether to run Python code that the model comes with.")
    cache_folder: str | None = Field(default=None, description="Where models of the hub are stored.")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of the Transformers model.")
    embeddings_cache: Any | None = Field(default=None, exclude=True, description="A LlamaIndex store of embeddings.")
    _encoder: Encoder | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _threads: ThreadPoolExecutor = PrivateAttr(default_factory=lambda: ThreadPoolExecutor(THREADS, "cocoa-embedding"))

    def __init__(
        self,
        model_name: str | Path | None = None,
        *,
        model: SentenceTransformer | Encoder | None = None,
        dimension: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the model, or take a loaded one.

        :param model_name: The folder or hub name of a SentenceTransformer [default: ``cocoa-qwen2vl``]; with
            ``model``, its name in errors and for loading it in another process.
        :param model: A loaded model.
        :param dimension: Truncate embeddings to this many dimensions, for a model trained for it [default: all].
        :param kwargs: ``device``; ``allowed_hosts``, the hosts from which images on the web may be fetched, such as
            ``["example.com"]``; ``trust_remote_code``, ``cache_folder`` and ``model_kwargs`` for loading the model (one
            that is given as ``model`` is loaded only in other processes); the fields of LlamaIndex's
            ``BaseEmbedding``, such as ``embed_batch_size``.
        :raises CocoaError: If the model cannot be loaded, or does not embed images.
        :raises UsageError: If the model has fewer dimensions, or there is no such option.
        """
        if unknown := kwargs.keys() - type(self).model_fields.keys():
            raise UsageError(
                f"{', '.join(sorted(unknown))}: not an option of CocoaEmbedding; for other options of load_encoder,"
                " such as max_pixels, give its result as model"
            )
        if model_name is None:
            model_name = DEFAULT_MODEL if model is None else model.name if isinstance(model, Encoder) else "the model"
        super().__init__(**{**kwargs, "model_name": str(model_name), "dimension": dimension})
        if model is not None:
            encoder = model if isinstance(model, Encoder) else Encoder(model, self.model_name)
            self._encoder = encoder if dimension is None else encoder.truncate(dimension)
        self.encoder.require_images()
        self.dimension = self.encoder.dimension

    @property
    def encoder(self) -> Encoder:
        """The model; an unpickled embedding loads it at first use.

        :raises CocoaError: If it cannot be loaded.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = load_encoder(
                    self.model_name,
                    self.device,
                    self.dimension,
                    trust_remote_code=self.trust_remote_code,
                    cache_folder=self.cache_folder,
                    model_kwargs=self.model_kwargs,
                )
            return self._encoder

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "CocoaEmbedding"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CocoaEmbedding:
        """Return a copy that shares the model."""
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, with which another process finds the model.

        :raises CocoaError: If the model was given loaded, and ``model_name`` is neither a folder nor a hub name.
        """
        require_findable(self.model_name, "the embedding")
        return self.to_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings. The model is loaded later: an error here would leave a pool of processes hanging."""
        super().__init__(**{name: value for name, value in state.items() if name != "class_name"})

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes in place, as a step of a pipeline: by text, by image or, if the model takes them, by both.

        :raises ImageError: If an image cannot be used.
        """
        images, both, texts = self._split(nodes)
        set_embeddings(images, self.get_image_embedding_batch([image for _, image in images], **kwargs))
        for batch in iter_batch(both, self.embed_batch_size):
            set_embeddings(batch, self._get_illustrated_embeddings(batch))
        super().__call__(texts, **kwargs)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes in place, as ``__call__`` does.

        :raises ImageError: If an image cannot be used.
        """
        images, both, texts = self._split(nodes)
        set_embeddings(images, await self.aget_image_embedding_batch([image for _, image in images], **kwargs))
        for batch in iter_batch(both, self.embed_batch_size):
            set_embeddings(batch, await self._in_thread(self._get_illustrated_embeddings, batch))
        await super().acall(texts, **kwargs)
        return nodes

    def _split(self, nodes: Sequence[BaseNode]) -> tuple[list[Illustrated], list[Illustrated], list[BaseNode]]:
        """Return the nodes to embed by image, by image and text, and by text; the first two with their image.

        :raises ImageError: If the image in a node is not in base64.
        """
        takes_both = self.encoder.model.supports(("image", "text"))
        images: list[Illustrated] = []
        both: list[Illustrated] = []
        texts: list[BaseNode] = []
        for node in nodes:
            if (image := image_of(node)) is None:
                texts.append(node)
            else:
                (both if takes_both and text_of(node) else images).append((node, image))
        return images, both, texts

    def _get_illustrated_embeddings(self, pairs: list[Illustrated]) -> list[Embedding]:
        items = [make_input(text_of(node), load_source(image, self.allowed_hosts)) for node, image in pairs]
        return self._embed_documents(items, [image for _, image in pairs])

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.encoder.embed_queries([{"text": query}])[0].tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        for text in texts:
            refuse_binary(text)
        return self._embed_documents([{"text": text} for text in texts], texts)

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        items = [make_input(image=load_source(image, self.allowed_hosts)) for image in img_file_paths]
        return self._embed_documents(items, img_file_paths)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        # In a separate thread, so that a query does not wait for all documents.
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await self._in_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._in_thread(self._get_text_embeddings, texts)

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return await self._in_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return await self._in_thread(self._get_image_embeddings, img_file_paths)

    async def _in_thread(self, embed: Callable[[Input], Output], inputs: Input) -> Output:
        # LlamaIndex starts all batches at once: in the event loop's own threads, each would read its images and hold
        # them in memory while it waits for the model.
        return await asyncio.get_running_loop().run_in_executor(self._threads, embed, inputs)

    def _embed_documents(self, items: Sequence[ModelInput], sources: Sequence[ImageSource]) -> list[Embedding]:
        """Embed texts or images with the document prompt.

        :param sources: What the items were made from, for errors.
        :raises CocoaError: If the model refuses an item.
        """
        try:
            return self.encoder.embed_documents(items, batch_size=self.embed_batch_size).tolist()
        except ValueError as error:
            if len(items) == 1:
                raise refusal(items[0], sources[0], one_line(error)) from error
        # One item fails the batch: embed each alone to find it.
        pairs = zip(items, sources, strict=True)
        return [embedding for item, source in pairs for embedding in self._embed_documents([item], [source])]


def set_embeddings(images: Sequence[Illustrated], embeddings: Sequence[Embedding]) -> None:
    """Store the embeddings of images in their nodes."""
    for (node, _), embedding in zip(images, embeddings, strict=True):
        node.embedding = embedding


def refusal(item: ModelInput, source: ImageSource, reason: str) -> CocoaError:
    """Return the error for a text or an image that the model does not accept."""
    if "image" not in item:
        return CocoaError(f"the text {source!a:.80} cannot be embedded ({reason})")
    name = printable(source) if isinstance(source, (str, Path)) else "an image that is not a file"
    return ImageError(name, f"cannot be embedded ({reason})")
