"""An encoder that loads its model when it first has to embed, and knows before whether it is the model it has to be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cocoa_embed.encode.description import Description, describe
from cocoa_embed.encode.encoder import Encoder, Key, ModelInput
from cocoa_embed.encode.jobs import EmbeddedImage, StreamSource
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, ImageError, printable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class LazyEncoder(Encoder):
    """An encoder on one device, whose model is loaded at first use.

    Neither of ``fingerprint``, ``dimension`` and ``require_images`` is a use, if the model was described before.
    """

    def __init__(
        self, model: str | Path, device: str | None = None, dimension: int | None = None, **options: Any
    ) -> None:
        """Name the model; nothing is loaded yet.

        :param options: Those of ``load_encoder``.
        """
        self.name = printable(model)
        self._dimension = dimension
        self._load = partial(load_encoder, model, device, **options)
        self._describe = partial(describe, model, options)
        self._lock = threading.Lock()
        self._loaded: list[Encoder] = []
        """None or one; truncated encoders share the list."""
        self._seconds: list[float] = []
        """How long that took."""

    @property
    def loaded(self) -> Encoder:
        """The encoder of the loaded model.

        :raises CocoaError: If it cannot be loaded.
        :raises UsageError: If its embeddings have fewer dimensions.
        """
        with self._lock:
            if not self._loaded:
                started = time.perf_counter()
                self._loaded.append(self._load())
                self._seconds.append(time.perf_counter() - started)
        (whole,) = self._loaded
        return whole if self._dimension is None else whole.truncate(self._dimension)

    @property
    def load_seconds(self) -> float:
        """The time that loading the model has taken."""
        return sum(self._seconds)

    @cached_property
    def model(self) -> SentenceTransformer:  # type: ignore[override]  # the base class sets it
        """The loaded model."""
        return self.loaded.model

    @cached_property
    def description(self) -> Description:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What an index has to know of the model; one that was described before is not loaded for it."""
        return self._describe(lambda: self.loaded.description)

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
        return self._dimension if self._dimension <= self.description.dimension else self.loaded.dimension

    def truncate(self, dimension: int) -> LazyEncoder:
        """Return an encoder of the same model with shorter embeddings; ``dimension`` refuses longer ones."""
        shorter = copy(self)
        shorter._dimension = dimension
        return shorter

    def require_images(self) -> None:
        """Check that the model takes images.

        :raises CocoaError: If it embeds only text.
        """
        if not self.description.takes_images:
            raise CocoaError(f"{self.name} does not embed images; use a multimodal model")

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
