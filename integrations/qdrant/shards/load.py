"""Load a folder of embeddings into a collection; what is already there is merged, so that loading can be repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from cocoa_embed.integrations.qdrant.indexing.embed_records import NewPoint
from cocoa_embed.integrations.qdrant.indexing.merge import Merger
from cocoa_embed.integrations.qdrant.indexing.writer import Writer
from cocoa_embed.integrations.qdrant.points import is_in_shard, own_locations, shards_of, stored_locations
from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record

LOOKUP_POINTS = 256
"""Points whose paths are looked up together."""


@dataclass(frozen=True)
class LoadSummary:
    """The result of loading a folder."""

    collection: str
    files: int
    points: int
    """Rows that were read; the collection may have had them before."""
    seconds: float


def load(
    folder: EmbeddingFolder,
    store: Store,
    on_file_done: Callable[[], object] = lambda: None,
    *,
    number: int = 1,
    count: int = 1,
) -> LoadSummary:
    """Load the points of a folder into a collection, which is created if it does not exist.

    Content that the collection already has, from an earlier file or run, keeps its vector and gets the paths of the new
    point; a path is removed from the point of its earlier content. Of several descriptions of an image, the one in the
    file that was written last is kept.

    :param number: The number of this process, from 1 to ``count``; each process loads every ``count``-th file.
    :raises CocoaError: If the folder has no embeddings, or those of another model than the collection.
    """
    signature = folder.require_signature()
    started = time.perf_counter()
    store.create(signature)
    names = folder.names()[number - 1 :: count]
    points = 0
    for name in names:
        # One writer for each file: the lookups of the next file find what it has written.
        with Writer(store, Merger(), lambda *_: None) as writer:
            remaining = folder.read(name)
            while group := list(islice(remaining, LOOKUP_POINTS)):
                load_group(group, store, writer)
                points += len(group)
            writer.finish()
        on_file_done()
    store.finish()
    return LoadSummary(store.collection, len(names), points, time.perf_counter() - started)


def load_group(points: Sequence[Point], store: Store, writer: Writer) -> None:
    """Write points; if several have the same path, the one with the latest mtime keeps it."""
    holders: dict[str, dict[str, float]] = {}
    paths = [each.path for point in points for each in stored_locations(point.payload)]
    for id_, payload in store.by_paths(paths).items():
        for each in own_locations(id_, payload):
            holders.setdefault(each.path, {})[id_] = each.mtime
    for point in points:
        records, late = records_of(point), set[str]()
        for record in records:
            others = {id_: mtime for id_, mtime in holders.get(record.key, {}).items() if id_ != point.id}
            if any(mtime > record.mtime for mtime in others.values()):
                late.add(record.key)
            else:
                for id_ in others:
                    writer.detach(id_, record.key)
        if held := [record for record in records if record.key not in late]:
            writer.insert(NewPoint(point, held))
            for path in late:  # which the new point names, too
                writer.detach(point.id, path)


def records_of(point: Point) -> list[Record]:
    """Return the records of a point's payload, without their images; the first has the description."""
    payload = point.payload
    shards = shards_of(payload)
    records: list[Record] = []
    for location in stored_locations(payload):
        shard = next((shard for shard in shards if is_in_shard(location.path, shard)), None)
        is_first = not records
        text = {} if payload.get("caption") is None else {"text": payload["caption"]}
        records.append(
            Record(
                key=location.path,
                relative_key=location.relative_path,
                read=_no_image,
                mtime=location.mtime,
                shard=shard,
                metadata={**payload.get("metadata", {}), **text} if is_first else {},
                metadata_source=payload.get("caption_source") if is_first else None,
            )
        )
    return records


def _no_image() -> NoReturn:
    raise AssertionError("a point that is loaded has its embedding")
