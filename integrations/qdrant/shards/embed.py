"""Embed the images of sources into a folder of Parquet files, part by part; parts that already exist are skipped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from typing import NamedTuple

from cocoa_embed.encode.devices import DeviceEncoder
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.qdrant.indexing.embed_records import FailedRecord, NewPoint, PointStream
from cocoa_embed.integrations.qdrant.points import describe
from cocoa_embed.integrations.qdrant.shards.files import FAILED_SUFFIX, SUFFIX, EmbeddingFolder
from cocoa_embed.integrations.qdrant.stores.base import Point, signature_of
from cocoa_embed.sources.base import Record, Shard, Source

PART_RECORDS = 2048
"""The average number of images in a part that is not a shard; the maximum is four times as many."""


class Part(NamedTuple):
    """What becomes one file: a shard, or records that are neighbours."""

    name: str
    """A digest of the keys, versions and descriptions of what it holds: the name of its file."""
    key: str
    """The key of the shard, or of the first record."""
    records: Callable[[], Iterator[Record]]
    """Yields the records, as a shard does."""


@dataclass(frozen=True)
class EmbedSummary:
    """The result of embedding sources, or one part."""

    out: str
    parts: int = 0
    """Files that were written."""
    skipped: int = 0
    """Files that were already there."""
    embedded: int = 0
    """Images that were embedded: copies in one part count once."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """Images that could not be used, including those of skipped files, as ``{"path", "reason"}``."""
    seconds: float = 0.0


def parts_of(sources: Iterable[Source], on_error: Callable[[str, str], object] = lambda *_: None) -> Iterator[Part]:
    """Yield the parts of sources: each shard that has a version, and the records of the others in groups.

    A group ends where a digest of the last record's key says so: a new file changes one or two groups, not all.

    :param on_error: Called with a list that cannot be read to its end, and the reason.
    :raises ImageError: If a folder cannot be listed.
    """
    shards = chain.from_iterable(source.shards() for source in sources)
    for is_versioned, together in groupby(shards, key=lambda shard: bool(shard.version)):
        if is_versioned:
            yield from (Part(digest([shard.key, shard.version]), shard.key, shard.records) for shard in together)
        else:
            records = chain.from_iterable(good_records(shard, on_error) for shard in together)
            while group := list(take_group(records)):
                yield Part(digest(map(version_of, group)), group[0].key, partial(iter, group))


def good_records(part: Shard | Part, on_error: Callable[[str, str], object]) -> Iterator[Record]:
    """Yield the records of a shard or a part; if it cannot be read to its end, those before the fault."""
    try:
        yield from part.records()
    except ImageError as error:
        on_error(part.key, error.reason)


def version_of(record: Record) -> str:
    """Return a string that changes when the image of a record, or its description, may have changed."""
    described = json.dumps(describe(record), sort_keys=True) if record.metadata else ""
    return f"{record.key} {record.mtime} {record.size}{described}"


def take_group(records: Iterator[Record]) -> Iterator[Record]:
    """Yield records up to the end of their group."""
    for record in islice(records, 4 * PART_RECORDS):
        yield record
        if int(digest([record.key]), 16) % PART_RECORDS == 0:
            return


def digest(texts: Iterable[str]) -> str:
    """Return 32 hexadecimal digits that identify texts in their order."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in texts:
        hashed.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return hashed.hexdigest()


def plan(
    sources: Iterable[Source], folder: EmbeddingFolder, *, number: int = 1, count: int = 1, retry_failed: bool = False
) -> Iterator[Part | EmbedSummary]:
    """Yield the parts that a folder lacks, the summaries of those that it has, and one of lists that cannot be read.

    :param number: The number of this machine, from 1 to ``count``; each machine embeds every ``count``-th part.
    :param retry_failed: Whether parts with images that could not be used count as missing.
    :raises CocoaError: If the folder or a source cannot be listed.
    """
    names = set(folder.names())
    failed: list[dict[str, str]] = []
    parts = parts_of(sources, lambda path, reason: failed.append({"path": path, "reason": reason}))
    for part in islice(parts, number - 1, None, count):
        if part.name + SUFFIX in names:
            yield EmbedSummary(folder.place, skipped=1)
        elif part.name + FAILED_SUFFIX in names and not retry_failed:
            yield EmbedSummary(folder.place, skipped=1, failed=folder.failed(part.name + FAILED_SUFFIX))
        else:
            yield part
    if failed:
        yield EmbedSummary(folder.place, failed=failed)


def embed_part(part: Part, folder: EmbeddingFolder, encoder: Encoder) -> EmbedSummary:
    """Embed the images of a part and write its file.

    :raises CocoaError: If the file cannot be written.
    """
    failed: list[dict[str, str]] = []
    encoder = encoder.truncate(encoder.dimension, encoder.most_vectors)

    def note(path: str, reason: str) -> None:
        failed.append({"path": path, "reason": reason})

    def points() -> Iterator[Point]:
        for outcome in PointStream(encoder=encoder, embed=folder.embed).run(good_records(part, note)):
            if isinstance(outcome, NewPoint):
                yield outcome.point
            elif isinstance(outcome, FailedRecord):
                note(outcome.record.key, outcome.error.reason)

    started, loading = time.perf_counter(), encoder.load_seconds
    count = folder.write(part.name, points(), failed, encoder.dimension * encoder.most_vectors)
    seconds = time.perf_counter() - started - (encoder.load_seconds - loading)
    return EmbedSummary(folder.place, int(count > 0), 0, count, failed, seconds)


def embed(planned: Iterable[Part | EmbedSummary], folder: EmbeddingFolder, encoder: Encoder) -> Iterator[EmbedSummary]:
    """Embed the parts of a ``plan``; yield a summary of each.

    :raises CocoaError: If the folder has embeddings of another model, or cannot be written.
    """
    folder.sign(signature_of(encoder, folder.embed))

    def finish(each: Part | EmbedSummary) -> EmbedSummary:
        return each if isinstance(each, EmbedSummary) else embed_part(each, folder, encoder)

    if not isinstance(encoder, DeviceEncoder):
        yield from map(finish, planned)
        return
    # Two at once, so that no device waits for the last images of a part.
    with closing(read_ahead(finish, planned, workers=2, ahead=1)) as finished:
        try:
            for _, summary in finished:
                yield summary.result()
        except BaseException:
            encoder.close()
            raise


def total(
    summaries: Iterable[EmbedSummary], out: str, seconds: Callable[[], float], faults: Iterable[dict[str, str]] = ()
) -> EmbedSummary:
    """Return the summary of all parts.

    :param faults: What could not be used when the sources were opened, as ``{"path", "reason"}``.
    """
    every = list(summaries)
    failed = sorted(chain(faults, *(each.failed for each in every)), key=lambda failure: failure["path"])
    return EmbedSummary(
        out,
        parts=sum(each.parts for each in every),
        skipped=sum(each.skipped for each in every),
        embedded=sum(each.embedded for each in every),
        failed=failed,
        seconds=seconds(),
    )
