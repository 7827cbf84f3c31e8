"""Encoders that load their model at first use, and may know its fingerprint and dimension before that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cocoa_embed.encode.description import Description, describe
from cocoa_embed.encode.encoder import Encoder, Key, ModelInput, check_dimension
from cocoa_embed.encode.jobs import EmbeddedImage, StreamSource
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import ImageError, printable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from typing_extensions import Self


Wanted: TypeAlias = "tuple[int | None, int]"
"""The shape of an embedding, as ``Encoder.truncate`` takes it."""


class DeferredEncoder(Encoder):
    """An encoder whose model is loaded at first use, by this process or by others.

    ``fingerprint``, ``dimension`` and ``require_images`` do not load a model that was described before.
    """

    def __init__(
        self, model: str | Path, dimension: int | None, options: Mapping[str, Any], start: Callable[[], Any]
    ) -> None:
        """Name the model; nothing is loaded yet.

        :param options: Options of ``load_encoder``.
        :param start: Loads the model, and returns the object that embeds with it and has its ``description``.
        """
        self.name = printable(model)
        self._dimension = dimension
        self._start = start
        self._describe = partial(describe, model, options)
        self._lock = threading.Lock()
        self._started: list[Any] = []
        """What ``start`` returned, or nothing yet; truncated encoders share the list."""
        self._seconds: list[float] = []
        """How long each start took."""

    @property
    def started(self) -> Any:  # noqa: ANN401
        """The object that embeds with the loaded model.

        :raises CocoaError: If the model cannot be loaded.
        """
        with self._lock:
            if not self._started:
                began = time.perf_counter()
                self._started.append(self._start())
                self._seconds.append(time.perf_counter() - began)
            return self._started[0]

    @property
    def load_seconds(self) -> float:
        """The time that loading the model has taken."""
        return sum(self._seconds)

    @cached_property
    def description(self) -> Description:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What an index needs to know about the model, which is loaded only if it was not described before."""
        return self._describe(lambda: self.started.description)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model."""
        return self.description.fingerprint

    @property
    def dimension(self) -> int:
        """The length of an embedding.

        :raises UsageError: If the model's embeddings have fewer dimensions.
        """
        if self._dimension is None:
            return self.description.dimension
        check_dimension(self.name, self._dimension, self.description.dimension)
        return self._dimension

    @property
    def most_vectors(self) -> int:
        """How many vectors the model makes of an input."""
        return self.description.vectors

    @property
    def _wanted(self) -> Wanted:
        return self._dimension, self._vectors

    def truncate(self, dimension: int | None, vectors: int = 1) -> Self:
        """Return an encoder of the same model with embeddings of another shape; too large a shape fails at use.

        :param dimension: The length of a vector; None for all values.
        :param vectors: The number of vectors.
        """
        return self._of_shape(dimension, vectors)

    def require_images(self, *, with_text: bool = False) -> None:
        """Check that the model takes images and, ``with_text``, an image and a text as one input."""
        self._require(self.description.takes_images, not with_text or self.description.takes_both)


class LazyEncoder(DeferredEncoder):
    """An encoder on one device, whose model is loaded at first use."""

    def __init__(
        self, model: str | Path, device: str | None = None, dimension: int | None = None, **options: Any
    ) -> None:
        """Name the model; nothing is loaded yet.

        :param options: Options of ``load_encoder``.
        """
        super().__init__(model, dimension, options, partial(load_encoder, model, device, **options))

    @property
    def loaded(self) -> Encoder:
        """The encoder of the loaded model.

        :raises CocoaError: If it cannot be loaded.
        :raises UsageError: If its embeddings have fewer dimensions.
        """
        whole: Encoder = self.started
        return whole.truncate(*self._wanted)

    @cached_property
    def model(self) -> SentenceTransformer:  # type: ignore[override]  # the base class sets it
        """The loaded model."""
        return self.loaded.model

    def embed_queries(self, inputs: Sequence[ModelInput], batch_size: int = 32) -> np.ndarray:
        """Embed queries as ``Encoder.embed_queries`` does."""
        return self.loaded.embed_queries(inputs, batch_size)

    def embed_documents(self, inputs: Sequence[ModelInput], batch_size: int = 32) -> np.ndarray:
        """Embed documents as ``Encoder.embed_documents`` does."""
        return self.loaded.embed_documents(inputs, batch_size)

    def stream_images(
        self, images: Iterable[tuple[Key, StreamSource]], **options: Any
    ) -> Iterator[tuple[Key, EmbeddedImage | ImageError]]:
        """Embed images as ``Encoder.stream_images`` does; the first one loads the model."""
        stream = iter(images)
        for first in stream:
            yield from self.loaded.stream_images(chain([first], stream), **options)
