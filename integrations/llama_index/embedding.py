"""A multimodal SentenceTransformer as a LlamaIndex embedding."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import (
    Field,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import BaseNode, ImageType
from llama_index.core.utils import iter_batch
from PIL import Image

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import CaptionedImage, StreamSource
from cocoa_embed.encode.load import load_encoder, require_findable
from cocoa_embed.errors import CocoaError, ImageError, UsageError, one_line
from cocoa_embed.images.load import ImageSource
from cocoa_embed.integrations.llama_index.nodes import image_of, read_source, refuse_binary, refuse_other_media, text_of

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
    settings and the model's fingerprint: another process loads the model by name when it first needs it, and refuses
    one that embeds differently. So does ``from_dict``.

    The keys of LlamaIndex's ``embeddings_cache`` are texts. It holds no images, and a query gets the vector of a stored
    text that is equal: use a cache for one model only, and only if its two prompts are equal.
    """

    device: str | None = Field(default=None, frozen=True, description="The torch device [default: the fastest].")
    dimension: int | None = Field(default=None, gt=0, description="The length of an embedding.")
    allowed_hosts: list[str] = Field(default_factory=list, description="Hosts from which images may be fetched.")
    trust_remote_code: bool = Field(
        default=False, frozen=True, description="Whether to run Python code that the model comes with."
    )
    cache_folder: str | None = Field(default=None, frozen=True, description="Where models of the hub are stored.")
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, frozen=True, description="Options of the Transformers model."
    )
    fingerprint: str | None = Field(default=None, description="The model's digest; any other model is refused.")
    embeddings_cache: Any | None = Field(default=None, exclude=True, description="A LlamaIndex store of embeddings.")
    _encoder: Encoder | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    # By process: one that is forked inherits the pool, but not its threads.
    _threads: dict[int, ThreadPoolExecutor] = PrivateAttr(
        default_factory=lambda: defaultdict(lambda: ThreadPoolExecutor(THREADS, "cocoa-embedding"))
    )

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
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
            that is given as ``model`` is loaded only in other processes); ``fingerprint``, as ``to_dict`` returns it,
            to refuse any other model; the fields of LlamaIndex's ``BaseEmbedding``, such as ``embed_batch_size``.
        :raises CocoaError: If the model cannot be loaded, does not embed images, or has another fingerprint.
        :raises UsageError: If the model has fewer dimensions, there is no such option, or the name of a model is given
            for a loaded one or the reverse.
        """
        if not isinstance(model_name, str | os.PathLike | None):
            raise UsageError(f"model_name is a {type(model_name).__name__}; give a loaded model as model=")
        if isinstance(model, str | os.PathLike):
            raise UsageError(
                f"model is the name {os.fspath(model)!a}; give a name as model_name, and a loaded model as model"
            )
        kwargs.pop("class_name", None)  # LlamaIndex's serializer adds it
        if unknown := kwargs.keys() - type(self).model_fields.keys():
            raise UsageError(
                f"{', '.join(sorted(unknown))}: not an option of CocoaEmbedding; for other options of load_encoder,"
                " such as max_pixels, give its result as model"
            )
        if model_name is None:
            model_name = DEFAULT_MODEL if model is None else model.name if isinstance(model, Encoder) else "the model"
        super().__init__(**{**kwargs, "model_name": os.fspath(model_name), "dimension": dimension})
        if model is not None:
            self._encoder = self._checked(model if isinstance(model, Encoder) else Encoder(model, self.model_name))
            self.dimension = dimension or self._encoder.dimension
        self.encoder.require_images()
        self.dimension = self.encoder.dimension

    @property
    def encoder(self) -> Encoder:
        """The model, with embeddings of ``dimension`` values; an unpickled embedding loads it at first use.

        :raises CocoaError: If it cannot be loaded, or its fingerprint differs from that of the pickled one.
        :raises UsageError: If its embeddings have fewer dimensions.
        """
        with self._lock:
            if self._encoder is None:
                loaded = load_encoder(
                    self.model_name,
                    self.device,
                    trust_remote_code=self.trust_remote_code,
                    cache_folder=self.cache_folder,
                    model_kwargs=self.model_kwargs,
                )
                self._encoder = self._checked(loaded)
            if self.dimension != self._encoder.dimension:
                self._encoder = self._encoder.truncate(self.dimension)
            return self._encoder

    def _checked(self, encoder: Encoder) -> Encoder:
        """Return the model if its fingerprint is the expected one.

        :raises CocoaError: If it is not.
        """
        if self.fingerprint is not None and self.fingerprint != encoder.fingerprint:
            raise CocoaError(
                f"the embedding was made with another model (fingerprint {self.fingerprint:.12}) than {encoder.name}"
                f" ({encoder.fingerprint:.12}); give the model that made it as model=, with the same max_pixels and"
                " dtype; for other processes, save that model to a folder, and give the folder as model_name"
            )
        return encoder

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "CocoaEmbedding"

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Return the settings and the fingerprint, computed only now: a pipeline's cache tells models apart by it."""
        settings = super().custom_model_dump(handler, info)
        if self._encoder is not None and "fingerprint" in settings:
            settings["fingerprint"] = self._encoder.fingerprint
        return settings

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CocoaEmbedding:
        """Return a copy that shares the model."""
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, with which another process finds the model, and the model's fingerprint.

        :raises CocoaError: If the model was given loaded, and ``model_name`` is neither a folder nor a hub name.
        """
        require_findable(self.model_name, "the embedding")
        return self.to_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings. The model is loaded later: an error here would leave a pool of processes hanging."""
        super().__init__(**{name: value for name, value in state.items() if name != "class_name"})

    def __call__(self, nodes: Sequence[BaseNode], *, show_progress: bool = False, **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes in place, as a step of a pipeline: by text, by image or, if the model takes them, by both.

        :param kwargs: LlamaIndex passes the options of all steps; those of others are ignored.
        :raises ImageError: If an image cannot be used.
        :raises CocoaError: If a node is of an image, a sound or a video, but holds neither an image nor a text.
        """
        images, both, texts = self._split(nodes)
        set_embeddings(images, self.get_image_embedding_batch([image for _, image in images], show_progress))
        for batch in iter_batch(both, self.embed_batch_size):
            set_embeddings(batch, self._get_illustrated_embeddings(batch))
        super().__call__(texts, show_progress=show_progress, **kwargs)
        return nodes

    async def acall(
        self, nodes: Sequence[BaseNode], *, show_progress: bool = False, **kwargs: Any
    ) -> Sequence[BaseNode]:
        """Embed nodes in place, as ``__call__`` does.

        :raises ImageError: If an image cannot be used.
        :raises CocoaError: If a node is of an image, a sound or a video, but holds neither an image nor a text.
        """
        images, both, texts = self._split(nodes)
        set_embeddings(images, await self.aget_image_embedding_batch([image for _, image in images], show_progress))
        for batch in iter_batch(both, self.embed_batch_size):
            set_embeddings(batch, await self._in_thread(self._get_illustrated_embeddings, batch))
        await super().acall(texts, show_progress=show_progress, **kwargs)
        return nodes

    def _split(self, nodes: Sequence[BaseNode]) -> tuple[list[Illustrated], list[Illustrated], list[BaseNode]]:
        """Return the nodes to embed by image, by image and text, and by text; the first two with their image.

        :raises ImageError: If the image in a node is not in base64.
        :raises CocoaError: If a node is of an image, a sound or a video, but holds neither an image nor a text.
        """
        takes_both = self.encoder.model.supports(("image", "text"))
        images: list[Illustrated] = []
        both: list[Illustrated] = []
        texts: list[BaseNode] = []
        for node in nodes:
            if (image := image_of(node)) is None:
                refuse_other_media(node)
                texts.append(node)
            else:
                (both if takes_both and text_of(node) else images).append((node, image))
        return images, both, texts

    def _get_illustrated_embeddings(self, pairs: list[Illustrated]) -> list[Embedding]:
        named = ((node, *read_source(image, self.allowed_hosts)) for node, image in pairs)
        return self._embed_images((name, CaptionedImage(data, text_of(node))) for node, name, data in named)

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.encoder.embed_queries([{"text": query}])[0].tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        for text in texts:
            refuse_binary(text)
        try:
            return self.encoder.embed_documents([{"text": text} for text in texts], self.embed_batch_size).tolist()
        except ValueError as error:
            if len(texts) == 1:
                raise CocoaError(f"the text {texts[0]!a:.80} cannot be embedded ({one_line(error)})") from error
        # One text fails the batch: embed each alone to find it.
        return [self._get_text_embedding(text) for text in texts]

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: Sequence[ImageSource]) -> list[Embedding]:
        return self._embed_images(
            ("PIL image", image) if isinstance(image, Image.Image) else read_source(image, self.allowed_hosts)
            for image in img_file_paths
        )

    def _embed_images(self, images: Iterable[tuple[str, StreamSource]]) -> list[Embedding]:
        """Embed images as documents; a stream decodes only as many at once as its limit of bytes allows.

        :param images: Pairs of a name, for errors, and an image.
        :raises ImageError: If one cannot be used.
        """
        embeddings: list[Embedding] = []
        for _, outcome in self.encoder.stream_images(images, batch_size=self.embed_batch_size):
            if isinstance(outcome, ImageError):
                raise outcome
            embeddings.append(outcome.vector.tolist())
        return embeddings

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
        return await asyncio.get_running_loop().run_in_executor(self._threads[os.getpid()], embed, inputs)


def set_embeddings(images: Sequence[Illustrated], embeddings: Sequence[Embedding]) -> None:
    """Store the embeddings of images in their nodes."""
    for (node, _), embedding in zip(images, embeddings, strict=True):
        node.embedding = embedding
