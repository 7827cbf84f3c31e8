"""Write new points and changes in threads, and remember which paths old points lose once everything new is stored."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from cocoa_embed.integrations.qdrant.indexing.embed_records import NewPoint
from cocoa_embed.integrations.qdrant.indexing.merge import BATCH_CHANGES, Change, Merger
from cocoa_embed.integrations.qdrant.points import Payload, caption_of, describe
from cocoa_embed.integrations.qdrant.stores.base import CAPTION_VECTOR, NewVector, Point
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record

BATCH_POINTS = 64
"""New points per write."""


@dataclass(eq=False)
class Batch:
    """What one thread writes: points, then changes of these and of others."""

    points: dict[str, Point] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    """Changes by point id, including those of the new points, which another process may have inserted meanwhile."""
    shards: Counter[str] = field(default_factory=Counter)
    """How many records of each shard the batch completes."""
    writing: Future[list[str]] | None = None


class Writer:
    """Writes the points and changes of a run; a batch that changes points of an earlier one waits for it."""

    def __init__(self, store: Store, merger: Merger, on_written: Callable[[Batch, list[str]], object]) -> None:
        """Start the threads.

        :param on_written: Called in the thread of the caller with each written batch, and the ids that it did not
            find (``Merger.merge``).
        """
        self._store = store
        self._merger = merger
        self._on_written = on_written
        self._pool = ThreadPoolExecutor(store.parallel, thread_name_prefix="cocoa-write")
        self._batch = Batch()
        self._written: deque[Batch] = deque()
        """Batches that are being written, the oldest first."""
        self._detached = tempfile.TemporaryFile("w+", encoding="utf-8")
        """Ids and paths of points that lose a path, one JSON list a line."""

    def __enter__(self) -> Writer:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the writes that have begun, and drop the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._detached.close()

    def pending(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of those points that are on their way to the store."""
        points = [self._batch.points, *(batch.points for batch in self._written)]
        return {id_: each[id_].payload for each in points for id_ in ids if id_ in each}

    def insert(self, new: NewPoint) -> None:
        """Store a new point."""
        self._batch.points[new.point.id] = new.point
        id_, image, payload, caption = new.point
        for record in new.records:
            self._hold(id_, record)
        vector = NewVector("", image) if caption is None else NewVector(CAPTION_VECTOR, caption)
        self._batch.changes[id_].vectors[caption_of(payload)] = vector
        if len(self._batch.points) >= BATCH_POINTS:
            self.flush()

    def hold(self, id_: str, record: Record, thumbnail: str | None = None, vector: NewVector | None = None) -> None:
        """Record that a stored point's content is held by a record, which describes it if it is the first.

        :param vector: A vector that embeds the record's caption, if that replaces the caption of the point.
        """
        change = self._hold(id_, record)
        if vector is not None:
            change.vectors[caption_of(describe(record))] = vector
        change.thumbnail = thumbnail or change.thumbnail
        if len(self._batch.changes) >= BATCH_CHANGES:
            self.flush()

    def _hold(self, id_: str, record: Record) -> Change:
        change = self._batch.changes.setdefault(id_, Change())
        change.hold(record)
        if record.shard is not None:
            self._batch.shards[record.shard] += 1
        return change

    def detach(self, id_: str, path: str) -> None:
        """Record that a path no longer holds a point's content; ``finish`` removes it once everything new is stored.

        :param path: The path in the payload.
        """
        self._detached.write(json.dumps([id_, path]) + "\n")

    def flush(self) -> None:
        """Start to write what was added; wait while there are more than two unfinished batches per thread."""
        batch, self._batch = self._batch, Batch()
        if batch.changes:
            # Threads take batches in order, so that no batch waits for a later one.
            earlier = [each.writing for each in self._written if each.points.keys() & batch.changes.keys()]
            batch.writing = self._pool.submit(self._write, batch, [future for future in earlier if future is not None])
            self._written.append(batch)
        while len(self._written) > 2 * self._store.parallel:
            self._take_written()

    def drain(self) -> None:
        """Wait until everything that was added is written."""
        self.flush()
        while self._written:
            self._take_written()

    def finish(self) -> None:
        """Write everything, then remove the detached paths, and the points that have no path left.

        :raises CocoaError: If the store fails.
        """
        self.drain()
        self._detached.seek(0)
        lines = iter(self._detached)
        while batch := list(map(json.loads, islice(lines, BATCH_CHANGES))):
            changes: dict[str, Change] = {}
            for id_, path in batch:
                changes.setdefault(id_, Change()).removed.add(path)
            self._merger.merge(self._store, changes)

    def _take_written(self) -> None:
        batch = self._written.popleft()
        assert batch.writing is not None, "only batches that are being written wait"
        self._on_written(batch, batch.writing.result())

    def _write(self, batch: Batch, earlier: Sequence[Future[list[str]]]) -> list[str]:
        wait(earlier)
        self._store.insert([*batch.points.values()])
        return self._merger.merge(self._store, batch.changes)
