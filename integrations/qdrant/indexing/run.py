"""One indexing run: skip unchanged shards and records, embed new content, merge it into the collection, prune.

A run may be killed at any moment: everything that it has stored is correct, and the next run does the rest. The new
content of a file is stored before the old content is removed, and a file that two points name is read again. What the
run keeps in memory does not grow with the number of records or points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeAlias

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.qdrant.indexing.embed_records import (
    FailedRecord,
    NewPoint,
    PointStream,
    StoredContent,
    caption_with_image,
)
from cocoa_embed.integrations.qdrant.indexing.manifest import CompleteShard, Fault, Manifest, state_of_points
from cocoa_embed.integrations.qdrant.indexing.merge import DESCRIPTION_KEYS, Change, Merger, NamedPoint
from cocoa_embed.integrations.qdrant.indexing.prune import prune_deleted
from cocoa_embed.integrations.qdrant.indexing.thumbnails import ThumbnailFolder
from cocoa_embed.integrations.qdrant.indexing.writer import Batch, Writer
from cocoa_embed.integrations.qdrant.points import HELD_KEYS, Payload, is_in_shard, is_same_json, own_locations
from cocoa_embed.integrations.qdrant.stores.base import IMAGE, NewVector, with_any_of
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record, Shard, Source, storable
from cocoa_embed.sources.shard_files import READER

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
    """Images whose content was already stored, possibly by this run, with a new path, caption or metadata."""
    replaced: int
    """Images whose content has changed; the old point is deleted unless another image has its content."""
    pruned: int
    """Images that no longer exist and were removed from the index; without ``prune`` none are."""
    failed: list[dict[str, str]]
    """Images, metadata and folders that could not be used, and paths not pruned, as ``{"path", "reason"}``."""
    passed_over: dict[str, int]
    """How many files and folders were passed over, by the reason: ``system folder``, ``companion of another file``,
    ``deleted file``, ``cache``, ``excluded``, ``link in an archive``, ``name again in an archive``,
    ``description of an image`` (a place that was given along with the image), ``description apart from its image``,
    ``metadata file in an archive``."""
    seconds: float
    """The duration, without loading the model."""
    images_per_second: float
    """Images embedded and stored per second."""


@dataclass
class ShardProgress:
    """A shard that is being indexed."""

    version: str
    seen: set[str] = field(default_factory=set)
    """The paths of its records, as payloads have them; only if the run prunes."""
    records: int = 0
    in_flight: int = 0
    """Records that are not written yet."""
    is_read: bool = False
    is_faulty: bool = False
    """Whether a record could not be read, so that the next run has to look again."""
    is_unpruned: bool = False
    """Whether points may name images that are no longer in it: it had points before, and the run does not prune."""
    has_stale_points: bool = False
    """Whether points of earlier content name its records until the run has finished."""


@dataclass
class IndexRun:
    """One run over sources, and what it has done so far."""

    sources: Sequence[Source]
    store: Store
    encoder: Encoder
    manifest: Manifest
    thumbnails: ThumbnailFolder | None = None
    llama_index: bool = False
    """Whether payloads get the fields that LlamaIndex's own ``QdrantVectorStore`` reads."""
    prune: bool = False
    """Whether to remove images that no longer exist from the index."""
    prune_all: bool = False
    """Whether to remove them even if most images of a source are gone."""
    on_done: Callable[[int], object] = lambda _: None
    """Called with the number of images that are done."""
    counts: Counter[Count] = field(default_factory=Counter)
    found: Counter[int] = field(default_factory=Counter)
    """How many images each source has, by its number."""
    pruned: int = 0
    embedded: int = 0
    """Contents that the model has embedded."""
    failed: list[dict[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """The number of files and folders that the sources have passed over, by the reason."""
    _before: dict[str, list[str]] = field(default_factory=dict)
    """The points that name each record in flight, by its key."""
    _shards: dict[str, ShardProgress] = field(default_factory=dict)
    """The shards that are not complete yet."""
    _complete_at_end: dict[str, CompleteShard] = field(default_factory=dict)
    """The shards whose records are stored, but that have stale points."""

    def __post_init__(self) -> None:
        self.embed = self.store.embed
        self._merger = Merger(self._is_missing, self.llama_index)

    def run(self, batch_size: int) -> None:
        """Bring the collection up to date with the sources.

        :param batch_size: The maximum number of images in a batch.
        :raises CocoaError: If the store or a source fails.
        """
        with Writer(self.store, self._merger, self._on_written) as self._writer:
            stream = PointStream(
                encoder=self.encoder,
                stored=self._stored,
                on_stored=self._on_stored,
                changes_caption=self._merger.changes_caption,
                known_fault=self.manifest.content_fault,
                thumbnails=self.thumbnails,
                llama_index=self.llama_index,
                embed=self.embed,
            )
            for outcome in stream.run(self._changed_records(), batch_size):
                if isinstance(outcome, NewPoint):
                    self._on_new(outcome)
                elif isinstance(outcome, StoredContent):
                    self.embedded += outcome.vector is not None
                    self._on_stored(outcome)
                else:
                    self._on_failed(outcome)
            if self.prune:
                self._writer.drain()  # a moved file's new path keeps its point
                pruned, kept = prune_deleted(self.store, self.sources, self.found, self._writer, self.prune_all)
                self.pruned += pruned
                self.failed += kept
            self._writer.finish()
            for key, shard in self._complete_at_end.items():
                self._remember(key, shard)

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
            passed_over=dict(self.passed_over),
            seconds=seconds,
            images_per_second=self.embedded / seconds,
        )

    def _records(self) -> Iterator[Record]:
        """Yield the records of all shards that the collection does not hold completely."""
        for number, source in enumerate(self.sources):
            for shard in source.shards():
                if not shard.version:
                    yield from self._good_records(shard, number, ShardProgress(""))
                elif not self._skip(shard, number):
                    yield from self._read_shard(shard, number)

    def _skip(self, shard: Shard, number: int) -> bool:
        """Return whether a shard is unchanged and the collection holds all of it; if so, count its records."""
        known = self.manifest.shard(storable(shard.key))
        faults = self.manifest.faults_in(storable(shard.key))
        if known is None or known.version != self._version(shard.version):
            return False
        points, good = self._points_of(shard.key), known.records - len(faults)
        if points != known.points or (good and not points) or (self.prune and known.is_unpruned):
            return False
        self.found[number] += known.records
        self.failed += [{"path": fault.key, "reason": fault.reason} for fault in faults]
        self.counts["unchanged"] += known.records - len(faults)
        self.on_done(known.records)
        return True

    def _read_shard(self, shard: Shard, number: int) -> Iterator[Record]:
        """Yield the records of a shard, and remember it when they are all stored."""
        progress = self._shards[shard.key] = ShardProgress(self._version(shard.version))
        progress.is_unpruned = not self.prune and self.store.count(with_any_of("shard", [storable(shard.key)])) > 0
        self.manifest.reopen(storable(shard.key))
        for record in self._good_records(shard, number, progress):
            progress.records += 1
            progress.in_flight += 1
            if self.prune:
                progress.seen.add(storable(record.key))
            yield record
        if self.prune and not progress.is_faulty:
            self._prune_shard(shard.key, progress.seen)
        progress.seen.clear()
        progress.is_read = True
        self._finish_records(shard.key, 0)

    def _good_records(self, shard: Shard, number: int, progress: ShardProgress) -> Iterator[Record]:
        """Yield the records of a shard; if it cannot be read to its end, those before the fault, which is noted."""
        try:
            for record in shard.records():
                self.found[number] += 1
                yield record
        except ImageError as error:
            self.failed.append({"path": shard.key, "reason": error.reason})
            progress.is_faulty = True

    def _prune_shard(self, shard: str, seen: set[str]) -> None:
        key = storable(shard)
        for id_, payload in self.store.scan(HELD_KEYS, with_any_of("shard", [key])):
            for path in (each.path for each in own_locations(id_, payload)):
                if is_in_shard(path, key) and path not in seen:
                    self._detach(id_, path, shard)
                    self.pruned += 1

    def _finish_records(self, shard: str | None, count: int) -> None:
        """Note that records of a shard are stored or have failed; remember the shard when all are."""
        if shard not in self._shards:
            return
        progress = self._shards[shard]
        progress.in_flight -= count
        if progress.is_read and not progress.in_flight:
            del self._shards[shard]
            if progress.is_faulty:
                return
            complete = CompleteShard(progress.version, progress.records, "", progress.is_unpruned)
            if progress.has_stale_points:
                self._complete_at_end[shard] = complete
            else:
                self._remember(shard, complete)

    def _remember(self, key: str, shard: CompleteShard) -> None:
        self.manifest.complete(storable(key), shard._replace(points=self._points_of(key)))

    def _points_of(self, shard: str) -> str:
        """Return what identifies the points of a shard; empty if there are none."""
        return state_of_points(self.store, storable(shard))

    def _version(self, version: str) -> str:
        """Return the version of a shard, with that of the readers and what a run adds to its points."""
        return f"{READER} {version} {self.thumbnails and self.thumbnails.folder} {self.llama_index}"

    def _changed_records(self) -> Iterator[Record]:
        """Yield the records that have to be read; the points that name them are looked up in groups."""
        records = self._records()
        while group := list(islice(records, LOOKUP_RECORDS)):
            points: dict[str, list[NamedPoint]] = {storable(record.key): [] for record in group}
            for id_, payload in self.store.by_paths([*points]).items():
                point = NamedPoint(id_, payload, {each.path: each for each in own_locations(id_, payload)})
                for path in points.keys() & point.locations.keys():
                    points[path].append(point)
            for record in group:
                named = points[storable(record.key)]
                if not self._is_unchanged(record, named) and not self._has_known_fault(record, named):
                    self._before[record.key] = [point.id for point in named]
                    yield record

    def _is_unchanged(self, record: Record, named: Sequence[NamedPoint]) -> bool:
        """Return whether a record has the size and mtime that it had; if so, bring its description up to date."""
        if len(named) != 1:  # new, or an earlier run was killed before it removed the old point
            return False
        (point,) = named
        id_, payload, path = point.id, point.payload, storable(record.key)
        has_time = record.mtime != 0 or record.shard is None  # a single address may have none
        lacks_thumbnail = self.thumbnails is not None and self.thumbnails.lacks(payload)
        if not (has_time and point.is_unchanged(record)) or lacks_thumbnail:
            return False
        if point.has_to_change(path):
            if self.embed != IMAGE and self._merger.changes_caption(payload, record):
                return False
            self._hold(record, id_, payload, "unchanged")
        else:  # another file describes the content
            self._finish_records(record.shard, 1)
            self._count("unchanged")
        return True

    def _hold(
        self,
        record: Record,
        id_: str,
        payload: Payload,
        count: Count,
        thumbnail: str | None = None,
        vector: NewVector | None = None,
    ) -> None:
        """Note that a stored content is held by a record; write it only if that changes the payload."""
        change = Change(thumbnail=thumbnail)
        change.hold(record)
        is_known = storable(record.key) in payload["paths"]
        after = self._merger.apply(payload, change) if is_known else None
        if after is not None and is_same_json(after, payload):
            self._finish_records(record.shard, 1)
        else:
            self._writer.hold(id_, record, thumbnail, vector)
        if after is not None and count == "unchanged":
            is_described = all(is_same_json(after[key], payload.get(key)) for key in DESCRIPTION_KEYS)
            count = "unchanged" if is_described else "updated"
        self._count(count)

    def _has_known_fault(self, record: Record, named: Sequence[NamedPoint]) -> bool:
        """Return whether a record has the size, mtime and caption that it had when it could not be used."""
        version = self._tried_version(record)
        reason = self.manifest.fault(storable(record.key), version) if version else None
        if reason is None:
            return False
        self.manifest.keep_fault(storable(record.key), storable(record.shard))
        for point in named:
            if not point.is_unchanged(record):  # otherwise its caption is at fault, and the image stays stored
                self._detach(point.id, storable(record.key), record.shard)
        self._fail(record, reason)
        return True

    def _stored(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of points that are in the collection, or on their way to it."""
        pending = self._writer.pending(ids)
        return {**self.store.retrieve([id_ for id_ in ids if id_ not in pending]), **pending}

    def _on_stored(self, stored: StoredContent) -> None:
        record, id_, payload, thumbnail, vector = stored
        is_known = storable(record.key) in payload["paths"]
        is_replaced = self._detach_others(record, id_)
        count: Count = "replaced" if is_replaced else "unchanged" if is_known else "updated"
        self._hold(record, id_, payload, count, thumbnail, vector)

    def _on_new(self, new: NewPoint) -> None:
        self.embedded += 1
        keys: set[str] = set()
        for record in new.records:
            is_replaced = self._detach_others(record, new.point.id)
            is_again = record.key in keys
            self._count("unchanged" if is_again else "replaced" if is_replaced else "updated" if keys else "indexed")
            keys.add(record.key)
        self._writer.insert(new)

    def _detach_others(self, record: Record, id_: str) -> bool:
        """Detach a record from the points of its earlier content; return whether there are any."""
        others = [other for other in self._before.pop(record.key, []) if other != id_]
        for other in others:
            self._detach(other, storable(record.key), record.shard)
        return bool(others)

    def _detach(self, id_: str, path: str, shard: str | None) -> None:
        """At the end of the run, remove a path, that of a record in this shard, from a point."""
        self._writer.detach(id_, path)
        if shard in self._shards:
            self._shards[shard].has_stale_points = True

    def _on_failed(self, failed: FailedRecord) -> None:
        record, error, tried = failed
        if tried is not None:
            self._detach_others(record, "")
            fault = Fault(storable(record.key), error.reason)
            self.manifest.add_fault(fault, storable(record.shard), self._tried_version(record), tried)
        else:
            self._before.pop(record.key, None)
            if record.shard in self._shards:
                self._shards[record.shard].is_faulty = True
        self._fail(record, error.reason)

    def _tried_version(self, record: Record) -> str:
        """Return a string that changes when what is embedded of a record may have; empty if that is unknown."""
        caption = caption_with_image(record, self.embed)
        return "" if not record.mtime else f"{record.size} {record.mtime}" + (f" {caption}" if caption else "")

    def _fail(self, record: Record, reason: str) -> None:
        self.failed.append({"path": record.key, "reason": reason})
        self._finish_records(record.shard, 1)
        self.on_done(1)

    def _count(self, count: Count) -> None:
        self.counts[count] += 1
        self.on_done(1)

    def _on_written(self, batch: Batch, lost: Sequence[str]) -> None:
        for shard, count in batch.shards.items():
            self._finish_records(shard, count)
        for record in (record for id_ in lost for record in batch.changes[id_].held.values()):
            reason = "another process removed its point at the same time; run again"
            self.failed.append({"path": record.key, "reason": reason})

    def _is_missing(self, key: str) -> bool:
        """Return whether a file that the run would have found is gone."""
        return any(source.covers(key) and source.is_deleted(key) for source in self.sources)
