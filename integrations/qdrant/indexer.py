"""Index folders of images into a Qdrant collection, and search it by text, by image, or by both."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image
from tqdm.auto import tqdm

from cocoa_embed.encode.encoder import Encoder, ModelInput, make_input
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.images.load import ImageSource
from cocoa_embed.integrations.qdrant.filters import parse_filters
from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles, find_image_files
from cocoa_embed.integrations.qdrant.index_run import Counts, IndexRun
from cocoa_embed.integrations.qdrant.index_state import LEDGER_KEYS, Ledger
from cocoa_embed.integrations.qdrant.points import storable
from cocoa_embed.integrations.qdrant.stores.base import (
    Hit,
    Signature,
    Store,
    StoreOptions,
    open_store,
    require_signature,
)
from cocoa_embed.integrations.qdrant.thumbnails import ThumbnailFolder

require("qdrant_client", "qdrant")

from qdrant_client import QdrantClient, models  # noqa: E402 - after the error that names the extra

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_PATH = "cocoa-index"
SHOWN_DIGITS = 12
"""Hexadecimal digits of a fingerprint that people are shown."""


@dataclass(frozen=True)
class IndexSummary:
    """What an indexing run did. Every file counts once: indexed, unchanged, updated, replaced or failed."""

    collection: str
    indexed: int
    """Files with new content, now points."""
    unchanged: int
    """Files that are as they were, or hold what another new file of this run holds."""
    updated: int
    """Files whose content was a point already, which now has their path, or their new caption and metadata."""
    replaced: int
    """Files whose content had changed: the new content is a point, the old is none unless another file holds it."""
    pruned: int
    """Files that are gone and were taken out, and their points, where no other file holds the same content."""
    failed: list[dict[str, str]]
    """The files left out, as ``{"path", "reason"}``."""
    seconds: float
    """Without the time that loading the model took."""
    images_per_second: float
    """Images embedded and stored, by ``seconds``."""


class QdrantIndexer:
    """A collection of images in Qdrant, and the multimodal model that embeds what goes in and what is asked.

    The collection is on a Qdrant server, in a local folder, or in a folder of Qdrant Edge. It carries the fingerprint
    of the model that made it, and another model is refused. The store and the model are opened at first use. Threads
    may share an indexer. It is a context manager.
    """

    def __init__(
        self,
        model: SentenceTransformer | Encoder | str | Path,
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

        :param model: Any SentenceTransformer that embeds text and images, or the folder or hub name of one.
        :param client: A client to use as it is; closing it remains the caller's.
        :param path: The folder of a local store, created if needed; ``cocoa-index`` if no other place is given.
        :param url: The address of a Qdrant server.
        :param edge: The folder of a Qdrant Edge store, created if needed; needs the extra ``edge``.
        :param api_key: What the server wants to see, if anything.
        :param collection: Created at the first indexing.
        :param dimension: The first so many values of an embedding are kept (Matryoshka); None for all, or for what the
            collection has.
        :param quantization: What a new collection on a server or in Qdrant Edge compares vectors by first: ``"scalar"``
            (a byte a value) or ``"binary"`` (a bit).
        :param on_disk: Whether a new collection on a server or in Qdrant Edge keeps its vectors on disk.
        :param batch_size: The most images to embed at once.
        :param device: The torch device, for a model that is to be loaded.
        :raises UsageError: If more than one of ``client``, ``path``, ``url`` and ``edge`` is given, ``batch_size`` is
            not positive, ``collection`` is no name for one, or ``url`` no address.
        :raises MissingExtraError: If the package for the place is not installed.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be 1 or more")
        if dimension is not None and dimension < 1:
            raise UsageError(f"dimension is {dimension}; it must be 1 or more")
        if client is None and url is None and edge is None:
            path = path or DEFAULT_PATH
        self.store: Store = open_store(
            client=client,
            path=path,
            url=url,
            edge=edge,
            api_key=api_key,
            collection=collection,
            options=StoreOptions(quantization=quantization, on_disk=on_disk),
        )
        """What holds the points."""
        self.batch_size = batch_size
        self._model = model
        self._dimension = dimension
        self._device = device
        self._whole: Encoder | None = None
        self._short: Encoder | None = None
        self._lock = threading.RLock()
        self._indexing = threading.Lock()

    @property
    def collection(self) -> str:
        """The name of the collection."""
        return self.store.collection

    @property
    def place(self) -> str:
        """Where the points are, for people to read."""
        return self.store.place

    @property
    def encoder(self) -> Encoder:
        """The model, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        return self._cut(self._whole_encoder(), self._dimension)

    def index(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        prune: bool = False,
        thumbnails: str | Path | None = None,
        progress: bool = True,
    ) -> IndexSummary:
        """Embed the images among and below ``paths`` and store them; a file that is as it was costs a look at its date.

        Captions and other columns of a folder's ``metadata.jsonl`` go into the payload, not into the embedding. A file
        that cannot be used is left out and listed in the summary. Files of the same content are one point.

        :param paths: A folder, a file, a pattern such as ``photos/**/*.png``, a ``.txt`` file with a path in each line,
            or several of them.
        :param prune: Whether to take out the files below ``paths`` that are gone.
        :param thumbnails: A folder for small copies of the images, named in the payload; made if needed.
        :param progress: Whether to draw a progress bar on standard error.
        :raises CocoaError: If there is no image at all, a ``metadata.jsonl`` is malformed, the model embeds no images,
            or the collection cannot hold its embeddings or is another model's.
        """
        files = find_image_files([paths] if isinstance(paths, (str, Path)) else paths)
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
            ledger = Ledger.read(self.store.scan(LEDGER_KEYS))
            bar = tqdm(total=len(files), desc=f"indexing into {self.collection}", unit="image", disable=not progress)
            with bar:
                run = IndexRun(files, self.store, encoder, ledger, self.batch_size, folder, bar.update)
                run.counts.failed += files.unlisted
                run.add()
                run.settle(prune=prune)
            self.store.finish()
        return self._summary(files, run.counts, time.perf_counter() - started)

    def search(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        limit: int = 10,
        offset: int = 0,
        score_threshold: float | None = None,
        query_filter: models.Filter | Sequence[str] | str | None = None,
        any_orientation: bool = False,
    ) -> list[Hit]:
        """Return the images nearest to a text, to an image, or to both taken as one query, best first.

        :param text: Always taken as text, even if it is the name of a file or an address.
        :param image: A path, bytes, a ``BytesIO``, a ``data:`` address or a PIL image.
        :param limit: The most hits to return.
        :param offset: How many of the best to leave out.
        :param score_threshold: The least cosine of a hit.
        :param query_filter: Conditions on the payload that must all hold, such as ``["mime=image/png", "width>=800"]``
            (``parse_filters``), or a Qdrant filter.
        :param any_orientation: Whether to look for the image turned and mirrored too, eight queries in all; a hit's
            score is then the best of them.
        :raises UsageError: If neither text nor image is given, or ``limit``, ``offset`` or a condition make no sense.
        :raises CocoaError: If there is no such collection, or another model made it.
        """
        if limit < 1 or offset < 0:
            raise UsageError(f"limit is {limit} and offset {offset}; limit must be 1 or more, offset 0 or more")
        item = make_input(text, image)
        if isinstance(query_filter, str):
            query_filter = [query_filter]
        if query_filter is not None and not isinstance(query_filter, models.Filter):
            query_filter = parse_filters(query_filter)
        views = views_of(item) if any_orientation else [item]
        encoder = self._encoder_for(require_signature(self.store))
        vectors = encoder.embed_queries(views)
        search = partial(self.store.search, score_threshold=score_threshold, query_filter=query_filter)
        if not any_orientation:
            return search(vectors[0], limit=limit, offset=offset)
        return best_hits(search(vector, limit=offset + limit) for vector in vectors)[offset : offset + limit]

    def close(self) -> None:
        """Close the store, unless its client was given; the next use opens it again."""
        with self._lock:
            self.store.close()

    def __enter__(self) -> QdrantIndexer:
        """Return the indexer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def _prepare_collection(self) -> Encoder:
        """Open the collection for writing, make and sign it if need be, and return the model for it."""
        signature = self.store.signature()
        if signature is None:
            encoder = self.encoder
            self.store.create(self._signature_of(encoder))
            return encoder
        encoder = self._encoder_for(signature)
        if signature.fingerprint is None:
            if self.store.count():
                raise CocoaError(
                    f"{self._name()} was not made by cocoa-embed index, and what it holds may be another model's;"
                    " choose another collection"
                )
            self.store.sign(self._signature_of(encoder))
        return encoder

    def _encoder_for(self, signature: Signature) -> Encoder:
        """Return the model, cut to the dimension of a collection that it made.

        :raises CocoaError: If another model made the collection, or its dimension is another.
        """
        encoder = self._whole_encoder()
        if signature.fingerprint not in (None, encoder.fingerprint):
            raise CocoaError(
                f"{self._name()} was made with {signature.model} (fingerprint {signature.fingerprint[:SHOWN_DIGITS]}),"
                f" not with {encoder.name} (fingerprint {encoder.fingerprint[:SHOWN_DIGITS]});"
                " choose another collection, or the model that it was made with"
            )
        dimension = self._dimension or (signature.dimension if signature.fingerprint else None)
        encoder = self._cut(encoder, dimension)
        if signature.dimension != encoder.dimension:
            raise CocoaError(
                f"{self._name()} holds vectors of {signature.dimension} dimensions, {encoder.name} makes"
                f" {encoder.dimension}; choose another collection, or the model that it was made with"
            )
        return encoder

    def _signature_of(self, encoder: Encoder) -> Signature:
        return Signature(model=encoder.name, fingerprint=encoder.fingerprint, dimension=encoder.dimension)

    def _name(self) -> str:
        return f"collection {self.collection!r} in {self.place}"

    def _whole_encoder(self) -> Encoder:
        """Return the model with all its dimensions, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        with self._lock:
            if self._whole is None:
                if isinstance(self._model, Encoder):
                    whole = self._model
                elif isinstance(self._model, (str, Path)):
                    whole = load_encoder(self._model, self._device)
                else:
                    whole = Encoder(self._model)
                whole.require_images()
                self._whole = whole
            return self._whole

    def _cut(self, whole: Encoder, dimension: int | None) -> Encoder:
        """Return the model with the first dimensions alone; the same object for the same dimension."""
        if dimension in (None, whole.dimension):
            return whole
        with self._lock:
            if self._short is None or self._short.dimension != dimension:
                self._short = whole.truncate(dimension)
            return self._short

    def _summary(self, files: ImageFiles, counts: Counts, seconds: float) -> IndexSummary:
        failed = len(counts.failed) - len(files.unlisted)
        return IndexSummary(
            collection=self.collection,
            indexed=counts.indexed,
            unchanged=len(files) - counts.indexed - len(counts.updated) - len(counts.replaced) - failed,
            updated=len(counts.updated),
            replaced=len(counts.replaced),
            pruned=counts.pruned,
            failed=sorted(counts.failed, key=lambda failure: failure["path"]),
            seconds=seconds,
            images_per_second=counts.embedded / seconds,
        )


def views_of(item: ModelInput) -> list[ModelInput]:
    """Return a query with its image in each of the eight orientations.

    :raises UsageError: If it has no image.
    """
    image = item.get("image")
    if not isinstance(image, Image.Image):
        raise UsageError("any_orientation turns the image of a query, and this one has none; give an image")
    return [item, *({**item, "image": image.transpose(turn)} for turn in Image.Transpose)]


def best_hits(searches: Iterable[list[Hit]]) -> list[Hit]:
    """Return what several searches have found, each point once and by its best score, best first."""
    best: dict[str, Hit] = {}
    for hit in (hit for hits in searches for hit in hits):
        if hit.id not in best or hit.score > best[hit.id].score:
            best[hit.id] = hit
    return sorted(best.values(), key=lambda hit: -hit.score)
