"""Index folders of images into a Qdrant collection, and search it by text, by image, or by both."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from cocoa_embed.encode.devices import DeviceEncoder, open_encoder
from cocoa_embed.encode.encoder import Encoder, ModelInput
from cocoa_embed.encode.load import require_findable
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import DEFAULT_INDEX
from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.integrations.qdrant.indexing.manifest import Manifest, open_manifest
from cocoa_embed.integrations.qdrant.indexing.prune import Forgotten, forget
from cocoa_embed.integrations.qdrant.indexing.run import IndexRun, IndexSummary
from cocoa_embed.integrations.qdrant.indexing.thumbnails import ThumbnailFolder
from cocoa_embed.integrations.qdrant.searching.searcher import Searcher
from cocoa_embed.integrations.qdrant.stores import base, open_store
from cocoa_embed.integrations.qdrant.stores.base import MEMORY, Hit, Signature
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions, read_create
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import SourceOptions
from cocoa_embed.sources.open import NO_OPTIONS, all_sources

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from sentence_transformers import SentenceTransformer

__all__ = ["Hit", "IndexSummary", "QdrantIndexer"]


class QdrantIndexer(Searcher):
    """A collection of images in Qdrant, and the multimodal model that embeds images and queries.

    The collection is in a local folder, in a folder of Qdrant Edge, or on a Qdrant server. It stores the fingerprint of
    the model that made it, and refuses any other. The store and the model are opened at first use. Threads may share an
    indexer; a pickled one holds only its settings. It is a context manager.
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
        prefer_grpc: bool = False,
        create: str | Mapping[str, Any] | None = None,
        embed: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
        devices: str | None = None,
        **model_options: Any,
    ) -> None:
        """Name the model and the collection; nothing is opened yet.

        :param model: A SentenceTransformer that embeds text and images, or the folder or hub name of one; None if
            nothing will be embedded, as in searches by indexed images.
        :param client: A client, which the caller closes.
        :param path: The folder of a local store, created if needed; ``cocoa-index`` if no location is given.
        :param url: The address of a Qdrant server.
        :param edge: The folder of a Qdrant Edge store, created if needed; requires the extra ``edge``.
        :param api_key: The API key for the Qdrant server.
        :param collection: The name of the collection, which the first run of ``index`` creates.
        :param dimension: Keep only the first values of an embedding (Matryoshka); None for all, or for the dimension of
            an existing collection.
        :param prefer_grpc: Whether to use gRPC for the server at ``url``, on port 6334.
        :param create: How a new collection on a server or in Qdrant Edge stores its points, such as ``{"shards": 4,
            "vectors": "float16", "hnsw": "after"}``: options of ``StoreOptions``.
        :param embed: What a new collection embeds: ``image``; ``image+caption``, both in one vector; or ``both``, a
            vector for each. None means ``image``, or what an existing collection embeds.
        :param batch_size: The maximum number of images in a batch.
        :param device: The torch device for a model that has to be loaded.
        :param devices: Several devices for it, one process each: ``"cuda:0,cuda:1"`` or ``"all"``.
        :param model_options: ``dtype``, ``max_pixels``, ``revision``, ``trust_remote_code``, ``workers`` and
            ``batch_tokens`` (``load_encoder``), for a model that has to be loaded.
        :raises UsageError: If more than one of ``client``, ``path``, ``url`` and ``edge`` is given, if an argument is
            invalid, or if a loaded model is given with options for loading one.
        :raises MissingExtraError: If a package that the location needs is not installed.
        """
        if client is None and url is None and edge is None:
            path = path or DEFAULT_INDEX
        given = {name: value for name, value in locals().items() if name not in ("self", "model", "client")}
        given |= given.pop("model_options")
        for place in ("path", "edge"):
            if given[place] is not None:  # the working folder may be another when it is opened
                given[place] = os.path.abspath(given[place])
        self._settings = None if client is not None or str(path) == MEMORY else given
        for name, number in {"batch_size": batch_size, "dimension": dimension}.items():
            if number is not None and number < 1:
                raise UsageError(f"{name} is {number}; it must be 1 or more")
        if embed not in (None, *base.EMBEDS):
            raise UsageError(f"embed is {embed!r}; it can be {', '.join(base.EMBEDS)}")
        loading = {"device": device, "devices": devices, **model_options}
        ignored = [name for name, value in loading.items() if value not in (None, False)]
        if ignored and not (model is None or isinstance(model, (str, Path))):
            raise UsageError(f"{', '.join(ignored)}: only for a model given by its name; this one is loaded already")
        options = StoreOptions(api_key=api_key, prefer_grpc=prefer_grpc, **read_create(create))
        self.store: Store = open_store(
            client=client, path=path, url=url, edge=edge, collection=collection, options=options
        )
        """The storage of the points."""
        self.batch_size = batch_size
        self._model = model
        self._dimension = dimension
        self._embed = embed
        self._model_options = loading
        self._encoder: Encoder | None = None
        self._manifest: Manifest | None = None
        self._lock = threading.Lock()
        self._indexing = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        """The model, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        return self._encoder_for(None)

    def require_model(self) -> None:
        """Check that the model made the collection; the model is loaded only if it was not described before.

        :raises CocoaError: If there is no such collection, another model made it, or the model cannot be loaded.
        """
        self._encoder_for(self.store.require_signature())

    def index(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        prune: bool = False,
        prune_all: bool = False,
        thumbnails: str | Path | None = None,
        llama_index: bool = False,
        retry_failed: bool = False,
        sources: SourceOptions = NO_OPTIONS,
        progress: bool = True,
    ) -> IndexSummary:
        """Embed and store the images in ``paths``; unchanged files are skipped by size and mtime.

        Captions and other columns of a folder's ``metadata.jsonl`` go into the payload, and captions into the embedding
        as ``embed`` says. Files that cannot be used are listed in the summary. Files with the same content share one
        point.

        :param paths: A folder, a file, a pattern such as ``photos/**/*.png``, a ``.txt`` file with one path or address
            per line, an archive, a table, a document, a video, an address, or several of them (``all_sources``).
        :param prune: Whether to remove files below ``paths`` that no longer exist from the index. A path without
            images, or one that would lose more than one point and more than 30 % of its points, is not pruned, and is
            listed in the summary.
        :param prune_all: Whether to remove them even then.
        :param thumbnails: A folder for small copies of the images, created if needed.
        :param llama_index: Whether to also store what LlamaIndex's own ``QdrantVectorStore`` reads, about 2 KB per
            point; ``CocoaRetriever`` does not need it.
        :param retry_failed: Whether to retry images that could not be used before.
        :param sources: What to exclude, and how to read places other than folders of photographs.
        :param progress: Whether to show a progress bar on standard error.
        :raises CocoaError: If there are no images, the model embeds no images, another model made the collection, or
            the collection holds other vectors.
        """
        places = [paths] if isinstance(paths, (str, Path)) else list(paths)
        prune = prune or prune_all
        passed_over = PassedOver(sources.exclude)
        failed: list[dict[str, str]] = []
        note = lambda path, reason: failed.append({"path": str(path), "reason": reason})  # noqa: E731
        found = all_sources(places, sources, note, passed_over, may_be_gone=prune)
        name = f"{self.store.place} {self.store.collection}"
        folder = None if thumbnails is None else ThumbnailFolder(thumbnails, name)
        with self._indexing:
            encoder = self._prepare_collection()
            if llama_index:
                self.store.create_payload_index("doc_id", base.KEYWORD)  # LlamaIndex deletes by it
            started, loading = time.perf_counter(), encoder.load_seconds
            manifest = self._open_manifest(encoder.fingerprint)
            if retry_failed:
                manifest.forget_faults()
            run = IndexRun(
                found,
                self.store,
                encoder,
                manifest,
                folder,
                llama_index=llama_index,
                prune=prune,
                prune_all=prune_all,
                failed=failed,
                passed_over=passed_over.counts,
            )
            title = f"indexing into {self.store.collection}"
            with tqdm(desc=title, unit="image", disable=not progress) as bar:
                run.on_done = bar.update
                run.run(self.batch_size)
            passed_over.warn_of_unused()
            self.store.finish()
        return run.summary(time.perf_counter() - started - (encoder.load_seconds - loading))

    def forget(self, paths: str | Path | Iterable[str | Path]) -> Forgotten:
        """Remove images from the index, whether or not their files exist. A copy elsewhere keeps its point.

        :param paths: Files, folders with everything below them, archives and documents with all their images, URLs.
        :raises CocoaError: If there is no such collection.
        """
        with self._indexing:
            manifest = self._open_manifest(self.store.require_signature().fingerprint)
            forgotten = forget(self.store, manifest, [paths] if isinstance(paths, (str, Path)) else list(paths))
            self.store.finish()
        return forgotten

    def close(self) -> None:
        """Close the store, unless its client was given; the next use opens it again."""
        self.store.close()
        if isinstance(self._encoder, DeviceEncoder):
            self._encoder.close()
        if self._manifest is not None and self.store.place is not None:
            self._manifest.close()
            self._manifest = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, including the API key, with which another process opens the collection and the model.

        A model that was given loaded is loaded there by its name, without options such as ``max_pixels``.

        :raises CocoaError: If a client was given, or a loaded model that another process cannot find.
        """
        if self._settings is None:
            raise CocoaError(
                "the indexer cannot be sent to another process, which cannot share its client; give path, url or edge"
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
        embed = self._embed or (signature.embed if signature else base.IMAGE)
        self.store.create(base.signature_of(encoder, embed))
        return encoder.truncate(encoder.dimension, encoder.most_vectors)

    def _open_manifest(self, fingerprint: str | None) -> Manifest:
        """Return the manifest of the collection; in memory if the collection is."""
        if self._manifest is None:
            self._manifest = open_manifest(self.store.place, self.store.collection, fingerprint)
        return self._manifest

    def _encoder_for(self, signature: Signature | None) -> Encoder:
        """Return the model, truncated to the dimension of a collection, if there is one.

        :raises CocoaError: If another model made the collection, or it has another dimension.
        """
        encoder = self._whole_encoder()
        dimension = self._dimension
        if signature is not None and signature.fingerprint:
            signature.require_vectors(encoder.most_vectors, encoder.name, self.store.name, "collection")
            if signature.fingerprint != encoder.fingerprint:
                raise CocoaError(
                    f"{self.store.name} was made with {signature.model} (fingerprint {signature.fingerprint:.12}), not"
                    f" with {encoder.name} ({encoder.fingerprint:.12}); choose another collection, or give the model"
                    " that made it, with the same --max-pixels"
                )
            if self._embed not in (None, signature.embed):
                raise CocoaError(
                    f"{self.store.name} was made with --embed {signature.embed}, not with --embed {self._embed}; leave"
                    " --embed out (embed= in Python), or choose another collection"
                )
            dimension = dimension or signature.dimension
        if dimension not in (None, encoder.dimension):
            encoder = encoder.truncate(dimension)
        if signature is not None and signature.dimension != encoder.dimension:
            raise CocoaError(
                f"{self.store.name} holds vectors of {signature.dimension} dimensions, but {encoder.name} makes"
                f" {encoder.dimension}; choose another collection, or give the model that made it"
            )
        return encoder

    def _embed_queries(self, items: Sequence[ModelInput], vectors: int) -> np.ndarray:
        encoder = self._encoder_for(self.store.require_signature())
        return encoder.truncate(encoder.dimension, vectors).embed_queries(items)

    def _whole_encoder(self) -> Encoder:
        """Return the model with all dimensions, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        with self._lock:
            if self._encoder is None:
                if self._model is None:
                    raise UsageError(
                        "no model was given, but a text or an image needs one; give the model of the collection"
                    )
                if isinstance(self._model, (str, Path)):
                    encoder = open_encoder(self._model, **self._model_options)
                else:
                    encoder = self._model if isinstance(self._model, Encoder) else Encoder(self._model)
                encoder.require_images()
                self._encoder = encoder
            return self._encoder
