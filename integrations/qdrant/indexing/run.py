"""One indexing run: skip unchanged shards and records, embed new contents, merge them into the collection, prune.

A run may be killed at any moment: everything that it has stored is correct, and the next run does the rest. The new
content of a file is stored before the old content is removed, and a file that two points name is read again. What the
run keeps in memory does not grow with the number of records or points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.images.load import TransientImageError
from cocoa_embed.integrations.qdrant.indexing.embed_records import FailedRecord, NewPoint, StoredContent, points_of
from cocoa_embed.integrations.qdrant.indexing.manifest import CompleteShard, Fault, Manifest
from cocoa_embed.integrations.qdrant.indexing.merge import Change, Merger
from cocoa_embed.integrations.qdrant.indexing.prune import prune_deleted, prune_shard
from cocoa_embed.integrations.qdrant.indexing.thumbnails import ThumbnailFolder
from cocoa_embed.integrations.qdrant.indexing.writer import Batch, Writer
from cocoa_embed.integrations.qdrant.points import (
    Payload,
    is_same_json,
    is_same_moment,
    stored_locations,
)
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record, Shard, Source, storable

LOOKUP_RECORDS = 256
"""Records whose points are looked up together."""

Count: TypeAlias = Literal["indexed", "unchanged", "updated", "replaced"]


@dataclass(frozen=True)
class IndexSummary:
    """The result of an indexing run. Every image counts once: indexed, unchanged, updated, replaced or failed."""

    collection: str
    indexed: int
    """Images whose content is new to the collection: the first of each content."""
    unchanged: int
    """Images with the same content, caption and metadata as before."""
    updated: int
    """Images whose content was stored already, also by this run, with a new path, caption or metadata."""
    replaced: int
    """Images with other content than before; the old point is deleted unless another image has its content."""
    pruned: int
    """Images that no longer exist and were removed from the index; without ``prune`` none are."""
    failed: list[dict[str, str]]
    """Images that could not be used, and places that were not pruned, as ``{"path", "reason"}``."""
    seconds: float
    """Without loading the model."""
    images_per_second: float
    """Images embedded and stored per second."""


@dataclass
class ShardProgress:
    """A shard that is being indexed."""

    version: str
    seen: set[str] = field(default_factory=set)
    """The paths of its records, as payloads have them."""
    in_flight: int = 0
    """Records that have been read and are not written yet."""
    is_read: bool = False
    is_faulty: bool = False
    """Whether a record could not be read, so that the next run has to look again."""


@dataclass
class IndexRun:
    """One run over sources, and what it has done so far."""

    sources: Sequence[Source]
    store: Store
    encoder: Encoder
    manifest: Manifest
    thumbnails: ThumbnailFolder | None = None
    llama_index: bool = False
    retry_failed: bool = False
    """Whether to try contents again that could not be used before."""
    on_record_done: Callable[[int], object] = lambda _: None
    """Called with the number of records that are done."""
    counts: Counter[Count] = field(default_factory=Counter)
    found: Counter[int] = field(default_factory=Counter)
    """How many records each source has, by its number."""
    pruned: int = 0
    embedded: int = 0
    """Contents that the model has embedded."""
    failed: list[dict[str, str]] = field(default_factory=list)
    _before: dict[str, list[str]] = field(default_factory=dict)
    """The points that name each record in flight, by its key."""
    _open: dict[str, ShardProgress] = field(default_factory=dict)
    """Shards that are not complete yet."""
    _completed: dict[str, CompleteShard] = field(default_factory=dict)

    def run(self, batch_size: int, *, prune: bool = False, prune_all: bool = False) -> None:
        """Bring the collection up to date with the sources.

        :param batch_size: The maximum number of images in a batch.
        :param prune: Whether to remove images that no longer exist from the index.
        :param prune_all: Whether to do so where most of them are gone, too.
        :raises CocoaError: If the store or a source fails.
        """
        merger = Merger(self._misses, self.llama_index)
        with Writer(self.store, merger, self._on_written) as writer:
            outcomes = points_of(
                self._changed_records(writer, merger),
                self.encoder,
                batch_size=batch_size,
                stored=partial(self._stored, writer),
                on_stored=partial(self._on_stored, writer, merger),
                known_fault=self._content_fault,
                thumbnails=self.thumbnails,
                llama_index=self.llama_index,
            )
            for outcome in outcomes:
                if isinstance(outcome, NewPoint):
                    self._on_new(writer, outcome)
                else:
                    self._on_failed(writer, outcome)
            if prune or prune_all:
                writer.flush()
                found = self.found
                pruned, kept = prune_deleted(self.store, self.sources, found, writer, even_most=prune_all)
                self.pruned += pruned
                self.failed += kept
            writer.finish()
            if writer.detached:  # points have left shards, too
                for key, complete in self._completed.items():
                    self._remember(key, complete)

    def summary(self, seconds: float) -> IndexSummary:
        """Return the summary of the finished run."""
        return IndexSummary(
            collection=self.store.collection,
            indexed=self.counts["indexed"],
            unchanged=self.counts["unchanged"],
            updated=self.counts["updated"],
            replaced=self.counts["replaced"],
            pruned=self.pruned,
            failed=sorted(self.failed, key=lambda failure: failure["path"]),
            seconds=seconds,
            images_per_second=self.embedded / seconds,
        )

    def _records(self) -> Iterator[Record]:
        """Yield the records of all shards that are not complete in the collection."""
        for number, source in enumerate(self.sources):
            for shard in source.shards():
                if shard.version and self._is_complete(shard, number):
                    continue
                progress = self._open[shard.key] = ShardProgress(shard.version)
                try:
                    for record in shard.records():
                        self.found[number] += 1
                        if shard.version:
                            progress.seen.add(storable(record.key))
                            progress.in_flight += 1
                        yield record
                except ImageError as error:
                    self.failed.append({"path": shard.key, "reason": error.reason})
                    progress.is_faulty = True
                progress.is_read = True
                self._complete_if_done(shard.key)

    def _is_complete(self, shard: Shard, number: int) -> bool:
        """Return whether the collection has an unchanged shard; count its records, and repeat its faults."""
        known = self.manifest.shard(shard.key)
        faults = self.manifest.faults_in(shard.key)
        if known is None or known.version != self._version(shard.version) or (faults and self.retry_failed):
            return False
        if self.store.count(("shard", [shard.key])) != known.points:
            return False
        self.found[number] += known.records
        self.failed += [{"path": fault.key, "reason": fault.reason} for fault in faults]
        self.counts["unchanged"] += known.records - len(faults)
        self.on_record_done(known.records)
        return True
