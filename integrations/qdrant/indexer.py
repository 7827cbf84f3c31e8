"""Index folders of images into a Qdrant collection, and search it by text, by image, or by both."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from cocoa_embed.encode.encoder import Encoder, ModelInput
from cocoa_embed.encode.load import load_encoder, require_findable
from cocoa_embed.errors import CocoaError, UsageError, printable
from cocoa_embed.folders import DEFAULT_INDEX
from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles
from cocoa_embed.integrations.qdrant.index_run import IndexRun, IndexSummary
from cocoa_embed.integrations.qdrant.index_state import STATE_KEYS, IndexState
from cocoa_embed.integrations.qdrant.points import storable
from cocoa_embed.integrations.qdrant.searching.searcher import Searcher
from cocoa_embed.integrations.qdrant.settle import settle
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import MEMORY, Hit, Signature, StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.integrations.qdrant.thumbnails import ThumbnailFolder

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from sentence_transformers import SentenceTransformer

__all__ = ["Hit", "IndexSummary", "QdrantIndexer"]


class QdrantIndexer(Searcher):
    """A collection of images in Qdrant, and the multimodal model that embeds images and queries.

    The collection is in a local folder, in a folder of Qdrant Edge, or on a Qdrant server. It stores the fingerprint of
    the model that made it, and refuses any other. The store and the model are opened at first use. Threads may share an
    indexer; a pickled one is its settings. It is a context manager.
    """

    def __init__(
        self,
        model: SentenceTransformer | Encoder | str | Path | None,
        *,
        client: QdrantClient | None = None,
        path: str | Path | None = None,
        url: str | None = None,
        edge: str | Path | None = None,
        api_key: str | None = None,
        collection: str = "images",
        dimension: int | None = None,
        quantization: Literal["scalar", "binary"] | None = None,
        on_disk: bool = False,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        """Name the model and the collection; nothing is opened yet.

        :param model: A SentenceTransformer that embeds text and images, or the folder or hub name of one; None if
            nothing will be embedded: to search by indexed images.
        :param client: A client, which the caller closes.
        :param path: The folder of a local store, created if needed; ``cocoa-index`` if no location is given.
        :param url: The address of a Qdrant server.
        :param edge: The folder of a Qdrant Edge store, created if needed; requires the extra ``edge``.
        :param api_key: The API key for the Qdrant server.
        :param collection: The name of the collection, which the first run of ``index`` creates.
        :param dimension: Keep only the first values of an embedding (Matryoshka); None for all, or for the dimension of
            an existing collection.
        :param quantization: How a new collection on a server or in Qdrant Edge compresses vectors: ``"scalar"`` (a byte
            per value) or ``"binary"`` (a bit).
        :param on_disk: Whether a new collection on a server or in Qdrant Edge keeps its vectors on disk.
        :param batch_size: The maximum number of images in a batch.
        :param device: The torch device for a model that has to be loaded.
        :raises UsageError: If more than one of ``client``, ``path``, ``url`` and ``edge`` is given, or if an argument
            is invalid.
        :raises MissingExtraError: If a package that the location needs is not installed.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "model", "client")}
        self._settings = None if client is not None or str(path) == MEMORY else given
        for name, number in {"batch_size": batch_size, "dimension": dimension}.items():
            if number is not None and number < 1:
                raise UsageError(f"{name} is {number}; it must be 1 or more")
        if client is None and url is None and edge is None:
            path = path or DEFAULT_INDEX
        options = StoreOptions(quantization=quantization, on_disk=on_disk, api_key=api_key)
        self.store: Store = open_store(
            client=client, path=path, url=url, edge=edge, collection=collection, options=options
        )
        """The storage of the points."""
        self.batch_size = batch_size
        self._model = model
        self._dimension = dimension
        self._device = device
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()
        self._indexing = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        """The model, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        return self._encoder_for(None)

    def index(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        prune: bool = False,
        thumbnails: str | Path | None = None,
        progress: bool = True,
    ) -> IndexSummary:
        """Embed and store the images in ``paths``; unchanged files are skipped by size and mtime.

        Captions and other columns of a folder's ``metadata.jsonl`` go into the payload, not into the embedding. Files
        that cannot be used are listed in the summary. Files with the same content are one point.

        :param paths: A folder, a file, a pattern such as ``photos/**/*.png``, a ``.txt`` file with one path per line,
            or several of them.
        :param prune: Whether to remove files below ``paths`` that no longer exist from the index.
        :param thumbnails: A folder for small copies of the images, created if needed.
        :param progress: Whether to show a progress bar on standard error.
        :raises CocoaError: If there are no images, the model embeds no images, another model made the collection, or
            the collection holds other vectors.
        """
        files = ImageFiles([paths] if isinstance(paths, (str, Path)) else paths)
        if not len(files) and not files.unlisted and not prune:
            names = ", ".join(files.covered) or "nothing"
            raise CocoaError(f"there are no images in {names}; name a folder that holds some (jpg, png, webp, ...)")
        if thumbnails is not None and files.covers(storable(os.path.abspath(thumbnails))):
            raise UsageError(
                f"the thumbnails in {printable(thumbnails)} would be indexed with the images; give a folder elsewhere"
            )
        with self._indexing:
            folder = None if thumbnails is None else ThumbnailFolder(thumbnails)
            encoder = self._prepare_collection()
            started = time.perf_counter()
            state = IndexState.read(self.store.scan(STATE_KEYS))
            title = f"indexing into {self.store.collection}"
            with tqdm(total=len(files), desc=title, unit="image", disable=not progress) as bar:
                run = IndexRun(files, self.store, encoder, state, folder, bar.update)
                run.store_new_content(self.batch_size)
                settle(run, prune=prune)
            self.store.finish()
        return run.summary(self.store.collection, time.perf_counter() - started)

    def close(self) -> None:
        """Close the store, unless its client was given; the next use opens it again."""
        self.store.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, the API key among them, by which another process opens the collection and the model.

        :raises CocoaError: If the client or the model were given, and another process cannot find them.
        """
        if self._settings is None:
            raise CocoaError(
                "the indexer cannot go to another process, which cannot share its client; give path, url or edge"
            )
        model = self._model
        if model is not None and not isinstance(model, (str, Path)):
            name = model.name if isinstance(model, Encoder) else self.encoder.name
            model = require_findable(name, "the indexer")
        return {"model": model, **self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings; the collection and the model are opened at first use."""
        self.__init__(**state)  # type: ignore[misc]

    def __enter__(self) -> QdrantIndexer:
        """Return the indexer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def _prepare_collection(self) -> Encoder:
        """Create, sign and complete the collection if needed, and return the model for it."""
        signature = self.store.signature()
        encoder = self._encoder_for(signature)
        if signature is not None and signature.fingerprint is None and self.store.count():
            raise CocoaError(
                f"{self.store.name} was not made by cocoa-embed index, and its vectors may be another model's;"
                " choose another collection"
            )
        self.store.create(Signature(encoder.name, encoder.fingerprint, encoder.dimension))
        return encoder

    def _encoder_for(self, signature: Signature | None) -> Encoder:
        """Return the model, truncated to the dimension of a collection, if there is one.

        :raises CocoaError: If another model made the collection, or it has another dimension.
        """
        encoder = self._whole_encoder()
        if signature is not None and signature.fingerprint not in (None, encoder.fingerprint):
            raise CocoaError(
                f"{self.store.name} was made with {signature.model} (fingerprint {signature.fingerprint:.12}), not with"
                f" {encoder.name} ({encoder.fingerprint:.12}); choose another collection, or the model that made it"
            )
        dimension = self._dimension or (signature.dimension if signature and signature.fingerprint else None)
        if dimension not in (None, encoder.dimension):
            encoder = encoder.truncate(dimension)
        if signature is not None and signature.dimension != encoder.dimension:
            raise CocoaError(
                f"{self.store.name} holds vectors of {signature.dimension} dimensions, {encoder.name} makes"
                f" {encoder.dimension}; choose another collection, or the model that made it"
            )
        return encoder

    def _embed_queries(self, items: Sequence[ModelInput]) -> np.ndarray:
        return self._encoder_for(self.store.require_signature()).embed_queries(items)

    def _whole_encoder(self) -> Encoder:
        """Return the model with all dimensions, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        with self._lock:
            if self._encoder is None:
                if self._model is None:
                    raise UsageError(
                        "no model was given, which a text or an image needs; give the one of the collection"
                    )
                encoder = (
                    load_encoder(self._model, self._device)
                    if isinstance(self._model, (str, Path))
                    else self._model
                    if isinstance(self._model, Encoder)
                    else Encoder(self._model)
                )
                encoder.require_images()
                self._encoder = encoder
            return self._encoder
