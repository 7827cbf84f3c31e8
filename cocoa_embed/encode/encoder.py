"""Embed queries, documents and streams of images with any multimodal SentenceTransformer.

Inputs are always dictionaries, ``{"text": ...}``, ``{"image": ...}`` or both: sentence-transformers guesses the
modality of a bare string, and takes a query that is the name of a file for an image. Queries get the model's query
prompt, and documents its document prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from PIL import Image

from cocoa_embed.encode.description import Description
from cocoa_embed.encode.jobs import EmbeddedImage, ModelInput, StreamSource
from cocoa_embed.encode.processor_lock import ProcessorLock
from cocoa_embed.encode.vectors import unit
from cocoa_embed.errors import CocoaError, ImageError, UsageError, is_valid_unicode, one_line
from cocoa_embed.images.load import ImageSource, load_image
from cocoa_embed.model.fingerprint import model_fingerprint
from cocoa_embed.model.template import literal, special_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality_types import Modality
    from typing_extensions import Self

Key = TypeVar("Key")

BATCH_TOKENS = 8192
"""The most visual tokens in a batch, by default."""


def require_unicode(text: str) -> None:
    """Refuse a text that UTF-8 cannot encode.

    :raises UsageError: If it is one.
    """
    if not is_valid_unicode(text):
        raise UsageError(f"the text {text!a} is not valid Unicode; give it in UTF-8")


def make_input(text: str | None = None, image: ImageSource | None = None) -> ModelInput:
    """Return a model's input for a text, an image, or both together.

    :raises UsageError: If there is neither (an empty text does not count), or the text is not valid Unicode.
    :raises ImageError: If the image cannot be used.
    """
    made: dict[str, str | Image.Image] = {}
    if not isinstance(text, str | None):
        raise UsageError(f"the text is a {type(text).__name__}; give one text, as a str")
    if not isinstance(image, ImageSource | None):
        raise UsageError(
            f"the image is a {type(image).__name__}; give one image: a path, bytes, or a PIL image, such as"
            " PIL.Image.fromarray(array)"
        )
    if image is not None:
        made["image"] = load_image(image)
    if text:
        require_unicode(text)
        made["text"] = text
    if not made:
        raise UsageError("neither a text nor an image was given; give one of them, or both")
    return made


def check_dimension(name: str, dimension: int, most: int) -> None:
    """Check that embeddings of ``most`` dimensions can be truncated to ``dimension``.

    :raises UsageError: If they cannot.
    """
    if not 1 <= dimension <= most:
        raise UsageError(f"{name} has embeddings of {most} dimensions, not of {dimension}; give 1 to {most}")


class Encoder:
    """A model that several threads may share; it embeds one batch at a time.

    With a model of several vectors, it returns only the first of each input; ``truncate`` gives an encoder with more.
    """

    _vectors = 1
    """How many vectors an embedding has."""

    def __init__(
        self,
        model: SentenceTransformer,
        name: str = "the model",
        dimension: int | None = None,
        *,
        workers: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        """Wrap a loaded model.

        :param name: The model's name in errors.
        :param dimension: Truncate every embedding to this many dimensions and normalise it, as Matryoshka models allow.
        :param workers: The threads that prepare the images of a stream, if the stream sets no other number.
        :param batch_tokens: The most visual tokens in a batch of a stream, if the stream sets no other number.
        :raises UsageError: If the model's embeddings have fewer dimensions.
        """
        self.model = model
        self.name = name
        self._streaming = {"workers": workers, "batch_tokens": batch_tokens}
        # A thread that waits for the model holds the queue, so that a stream's next batch cannot overtake a query.
        self._queue = threading.Lock()
        self._lock = threading.Lock()
        self._processor = ProcessorLock()
        self._dimension = dimension
        if dimension is not None:
            check_dimension(name, dimension, self._model_dimension)

    @property
    def dimension(self) -> int:
        """The length of an embedding."""
        return self._model_dimension if self._dimension is None else self._dimension

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an embedding."""
        return (self.dimension,) if self._vectors == 1 else (self._vectors, self.dimension)

    @property
    def most_vectors(self) -> int:
        """How many vectors the model makes of an input."""
        from cocoa_embed.model.export import count_vectors

        return count_vectors(self.model)

    @cached_property
    def _model_dimension(self) -> int:
        """The length of the model's own embeddings; measured if the model does not know it."""
        if known := self.model.get_embedding_dimension():
            return known
        example: ModelInput = {"text": "a"} if self.model.supports("text") else {"image": Image.new("RGB", (56, 56))}
        return Encoder(self.model).embed_queries([example]).shape[1]

    def truncate(self, dimension: int | None, vectors: int = 1) -> Self:
        """Return an encoder of the same model with embeddings of another shape; both share the model's locks.

        :param dimension: The length of a vector; None for all values.
        :param vectors: 1 gives embeddings of shape ``(inputs, dimension)``, more ``(inputs, vectors, dimension)``.
        :raises UsageError: If the model's embeddings have fewer dimensions or vectors.
        """
        if dimension is not None:
            check_dimension(self.name, dimension, self._model_dimension)
        if not 1 <= vectors <= (most := self.most_vectors):
            raise UsageError(f"vectors is {vectors}, but {self.name} makes {most} per input; give 1 to {most}")
        return self._of_shape(dimension, vectors)

    def _of_shape(self, dimension: int | None, vectors: int) -> Self:
        if (dimension, vectors) == (self._dimension, self._vectors):
            return self
        other = copy(self)
        other._dimension, other._vectors = dimension, vectors
        return other

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model (``model_fingerprint``)."""
        return model_fingerprint(self.model)

    @property
    def load_seconds(self) -> float:
        """The time that this encoder has spent loading its model, which it may do at first use."""
        return 0.0

    @property
    def description(self) -> Description:
        """What an index needs to know about the model."""
        takes = self.model.supports
        both = takes(("image", "text"))
        return Description(self.fingerprint, self._model_dimension, takes("image"), both, self.most_vectors)

    def require_images(self, *, with_text: bool = False) -> None:
        """Check that the model takes images.

        :param with_text: Whether it must also take an image and a text as one input.
        :raises CocoaError: If it does not.
        """
        self._require(self.model.supports("image"), not with_text or self.model.supports(("image", "text")))

    def _require(self, takes_images: bool, takes_both: bool) -> None:
        if not takes_images:
            raise CocoaError(f"{self.name} does not embed images; use a multimodal model")
        if not takes_both:
            raise CocoaError(
                f"{self.name} does not embed an image together with a text; use --embed both (embed= in Python)"
            )

    def embed_queries(self, inputs: Sequence[ModelInput], batch_size: int = 32) -> np.ndarray:
        """Embed queries, with the model's query prompt.

        :return: Array of shape ``(len(inputs), dimension)``, float32, or ``(len(inputs), vectors, dimension)``.
        :raises CocoaError: If the model does not take these modalities, or refuses an input.
        """
        try:
            return self._embed(self.model.encode_query, inputs, batch_size)
        except ValueError as error:
            # Processors refuse an image much longer than wide.
            raise CocoaError(f"{self.name} does not accept the query ({one_line(error)})") from error

    def embed_documents(self, inputs: Sequence[ModelInput], batch_size: int = 32) -> np.ndarray:
        """Embed documents, with the model's document prompt.

        :return: Array of shape ``(len(inputs), dimension)``, float32, or ``(len(inputs), vectors, dimension)``.
        :raises CocoaError: If the model does not take these modalities.
        """
        return self._embed(self.model.encode_document, inputs, batch_size)

    def _embed(self, encode: Callable[..., Any], inputs: Sequence[ModelInput], batch_size: int) -> np.ndarray:
        self._check(inputs)
        with self._turn(), self._processor.use(for_documents=False):
            embeddings = encode(self._literal(inputs), batch_size=batch_size, show_progress_bar=False)
        return self._finish(np.asarray(embeddings))

    def stream_images(
        self,
        images: Iterable[tuple[Key, StreamSource]],
        *,
        workers: int | None = None,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        thumbnail_size: int | None = None,
    ) -> Iterator[tuple[Key, EmbeddedImage | ImageError]]:
        """Embed any number of images as documents, in the order given, while others are read and prepared.

        The input is read lazily, some batches ahead. An image that cannot be used yields an ``ImageError`` in its place
        and affects no other image. The embeddings are those of ``embed_documents``. Several threads may stream and
        embed queries at the same time; one stream belongs to one thread.

        :param images: Pairs of a key and an image: a path, the bytes of a file, a PIL image, or a ``CaptionedImage``.
        :param workers: Threads that prepare images while the model runs; None takes the encoder's number, or chooses by
            device and cores.
        :param batch_size: The most images in a batch.
        :param batch_tokens: The most visual tokens in a batch, including those that pad images to the longest; None
            takes the encoder's number, or ``BATCH_TOKENS``.
        :param thumbnail_size: Draw thumbnails, with this many pixels on their longest side.
        :raises CocoaError: If the model does not embed images.
        :raises UsageError: If a number is not positive.
        """
        self.require_images()
        workers = self._streaming["workers"] if workers is None else workers
        batch_tokens = self._streaming["batch_tokens"] if batch_tokens is None else batch_tokens
        numbers = {"workers": workers, "batch_size": batch_size, "batch_tokens": batch_tokens}
        for name, number in {**numbers, "thumbnail_size": thumbnail_size}.items():
            if number is not None and number < 1:
                raise UsageError(f"{name} is {number}; it must be 1 or more")
        from cocoa_embed.encode.document_model import DocumentModel
        from cocoa_embed.encode.stream import ImageStream, default_workers

        return ImageStream(
            model=DocumentModel(self.model, self._processor),
            literal=self._literal,
            images=images,
            turn=self._turn,
            finish=self._finish,
            workers=workers or default_workers(is_on_cpu=self.model.device.type == "cpu"),
            batch_size=batch_size,
            batch_tokens=batch_tokens or BATCH_TOKENS,
            thumbnail_size=thumbnail_size,
        ).run()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the model; threads get it in the order in which they request it."""
        with self._queue:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _literal(self, inputs: Sequence[ModelInput]) -> list[ModelInput]:
        """Return inputs in whose texts special tokens are read as plain characters, in other models' templates, too."""
        from transformers import PreTrainedTokenizerBase

        tokenizer = self.model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return list(inputs)
        tokens = special_tokens(tokenizer)
        return [{**each, "text": literal(str(each["text"]), tokens)} if "text" in each else each for each in inputs]

    def _finish(self, embeddings: np.ndarray) -> np.ndarray:
        """Return embeddings as float32, truncated and normalised if this encoder has its own dimension.

        :param embeddings: Array of shape ``(inputs, the model's dimension)``, or all vectors of an input concatenated.
        :return: Array of shape ``(inputs, dimension)``, or ``(inputs, vectors, dimension)`` if there are several.
        """
        embeddings = embeddings.astype(np.float32, copy=False)
        if (most := self.most_vectors) > 1:
            several = embeddings.reshape(len(embeddings), most, -1)
            embeddings = several[:, 0] if self._vectors == 1 else several[:, : self._vectors]
        if self._dimension is None or self._dimension == embeddings.shape[-1]:
            return embeddings
        return unit(embeddings[..., : self._dimension])

    def _check(self, inputs: Sequence[ModelInput]) -> None:
        """Refuse inputs of modalities that the model does not take, and texts that UTF-8 cannot encode."""
        for text in (each["text"] for each in inputs if "text" in each):
            require_unicode(str(text))
        for keys in map(sorted, {frozenset(each) for each in inputs}):
            is_one = len(keys) == 1
            if not self.model.supports(cast("Modality", keys[0] if is_one else tuple(keys))):
                together = "" if is_one else " together"
                raise CocoaError(f"{self.name} does not embed {' and '.join(keys)}{together}")
