"""Load a folder of embeddings into a collection; what is there already is merged, so that it can be done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.integrations.qdrant.indexing.embed_records import NewPoint
from cocoa_embed.integrations.qdrant.indexing.merge import Merger
from cocoa_embed.integrations.qdrant.indexing.writer import Writer
from cocoa_embed.integrations.qdrant.points import shards_of, stored_locations
from cocoa_embed.integrations.qdrant.shards.files import SIGNATURE_FILE, EmbeddingFolder
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

    A content that the collection has already, from an earlier file or run, keeps its vector and gets the paths of the
    new point; a path leaves the point of its earlier content.

    :param number: Of this process, from 1 to ``count``, of those that load the folder, each every ``count``-th file.
    :raises CocoaError: If the folder has no embeddings, or those of another model than the collection.
    """
    signature = folder.signature()
    if signature is None:
        raise CocoaError(
            f"{printable(folder.place)} has no {SIGNATURE_FILE}; name a folder that cocoa-embed embed wrote"
        )
    started = time.perf_counter()
    store.create(signature)
    names = sorted(folder.names())[number - 1 :: count]
    points = 0
    with Writer(store, Merger(lambda _: False), lambda *_: None) as writer:
        for name in names:
            remaining = folder.read(name)
            while group := list(islice(remaining, LOOKUP_POINTS)):
                holders = holders_of(store, group)
                for point in group:
                    writer.insert(NewPoint(point, records_of(point)))
                    for path in (each.path for each in stored_locations(point.payload)):
                        for id_ in holders.get(path, set()) - {point.id}:
                            writer.detach(id_, path)
                points += len(group)
            on_file_done()
        writer.finish()
    store.finish()
    return LoadSummary(store.collection, len(names), points, time.perf_counter() - started)


def holders_of(store: Store, points: Iterable[Point]) -> dict[str, set[str]]:
    """Return the ids of the stored points that name each path of some points."""
    holders: dict[str, set[str]] = {each.path: set() for point in points for each in stored_locations(point.payload)}
    for id_, payload in store.by_paths([*holders]).items():
        for path in (each.path for each in stored_locations(payload)):
            if path in holders:
                holders[path].add(id_)
    return holders


def records_of(point: Point) -> list[Record]:
    """Return the records of a point's payload, without their images; the first has the description."""
    payload = point.payload
    shards = shards_of(payload)
    records: list[Record] = []
    for location in stored_locations(payload):
        shard = next((shard for shard in shards if location.path.startswith(f"{shard}#")), None)
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
