"""Turn the records of any source into points: read, hash, skip what is stored, embed, describe. Writes no point.

Whoever calls decides what happens to the points: an indexing run merges them into a collection, and an embedding job
writes them to files.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import EmbeddedImage
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.images.load import decode_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.indexing.thumbnails import THUMBNAIL_SIZE, ThumbnailFolder
from cocoa_embed.integrations.qdrant.points import Payload, describe, location_of, make_payload, point_id
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.sources.base import Record

GROUP_RECORDS = 64
"""Records that are looked up together."""
GROUP_BYTES = 32 * 2**20
"""A group ends with the record that makes its files larger than this."""


class Content(NamedTuple):
    """What identifies the content of an image file, and its size in bytes."""

    id: str
    """The id of its point."""
    sha256: str
    bytes: int


class NewPoint(NamedTuple):
    """A content that was embedded: its point names all ``records`` that hold it, and is described by the first."""

    point: Point
    records: list[Record]


class StoredContent(NamedTuple):
    """A record whose content has a point already."""

    record: Record
    id: str
    payload: Payload
    """The point's, as ``stored`` returned it."""
    thumbnail: str | None
    """The path of a thumbnail that was missing and is drawn now."""


class FailedRecord(NamedTuple):
    """A record that cannot be used."""

    record: Record
    error: ImageError
    sha256: str | None
    """Of its content; None if it could not be read."""


Outcome: TypeAlias = NewPoint | FailedRecord


def nothing_stored(ids: Sequence[str]) -> Mapping[str, Payload]:
    """Return no payload: every content is new."""
    return {}


def points_of(
    records: Iterable[Record],
    encoder: Encoder,
    *,
    batch_size: int = 32,
    stored: Callable[[Sequence[str]], Mapping[str, Payload]] = nothing_stored,
    on_stored: Callable[[StoredContent], object] = lambda _: None,
    known_fault: Callable[[str], str | None] = lambda _: None,
    thumbnails: ThumbnailFolder | None = None,
    llama_index: bool = False,
) -> Iterator[Outcome]:
    """Yield a point for each new content, and every record that cannot be used.

    Records are read lazily, some batches ahead, and memory is bounded. Records with the same content that are in flight
    together are one point; a copy that comes later is a second point with the same id, unless ``stored`` knows it.

    :param batch_size: The maximum number of images in a batch.
    :param stored: Returns, of the ids of contents, those that have a point, with its payload. They are not embedded.
    :param on_stored: Called with each record whose content is stored.
    :param known_fault: Returns why a content, by its SHA-256, could not be used before; it is not tried again.
    :param thumbnails: Where to write small copies.
    :param llama_index: Whether payloads have the fields that LlamaIndex's own ``QdrantVectorStore`` reads.
    :raises CocoaError: If the model does not embed images, or a thumbnail cannot be written.
    """
    stream = _PointStream(stored, on_stored, known_fault, thumbnails, llama_index)
    size = None if thumbnails is None else THUMBNAIL_SIZE
    with closing(read_ahead(read_record, records)) as reading:
        embedded = encoder.stream_images(stream.new_contents(reading), batch_size=batch_size, thumbnail_size=size)
        for content, outcome in embedded:
            yield from stream.take_failures()
            yield from stream.finish(content, outcome)
        yield from stream.take_failures()


def read_record(record: Record) -> tuple[Content, bytes]:
    """Read and hash a record.

    :raises ImageError: If it cannot be read.
    """
    data = record.read()
    sha256 = hashlib.sha256(data).hexdigest()
    return Content(point_id(sha256), sha256, len(data)), data


@dataclass
class _PointStream:
    """What is between reading and embedding."""

    stored: Callable[[Sequence[str]], Mapping[str, Payload]]
    on_stored: Callable[[StoredContent], object]
    known_fault: Callable[[str], str | None]
    thumbnails: ThumbnailFolder | None
    llama_index: bool
    _embedding: dict[str, list[Record]] = field(default_factory=dict)
    """The records of each content that is being embedded."""
    _failed: deque[FailedRecord] = field(default_factory=deque)

    def take_failures(self) -> Iterator[FailedRecord]:
        """Yield the failures that were found since the last call."""
        while self._failed:
            yield self._failed.popleft()

    def new_contents(
        self, reading: Iterable[tuple[Record, Future[tuple[Content, bytes]]]]
    ) -> Iterator[tuple[Content, bytes]]:
        """Yield each new content once; pass on the records whose content is stored, or which cannot be used."""
        for group in self._groups(reading):
            ids = {content.id for _, content, _ in group} - self._embedding.keys()
            payloads = self.stored(sorted(ids))
            for record, content, data in group:
                if content.id in self._embedding:
                    self._embedding[content.id].append(record)
                elif content.id in payloads:
                    self._pass_stored(record, content, payloads[content.id], data)
                elif reason := self.known_fault(content.sha256):
                    self._failed.append(FailedRecord(record, ImageError(record.key, reason), content.sha256))
                else:
                    self._embedding[content.id] = [record]
                    yield content, data

    def _groups(
        self, reading: Iterable[tuple[Record, Future[tuple[Content, bytes]]]]
    ) -> Iterator[list[tuple[Record, Content, bytes]]]:
        """Yield the records that could be read in groups; note the others."""
        group: list[tuple[Record, Content, bytes]] = []
        size = 0
        for record, future in reading:
            try:
                content, data = future.result()
            except ImageError as error:
                self._failed.append(FailedRecord(record, error, None))
                continue
            group.append((record, content, data))
            size += content.bytes
            if len(group) == GROUP_RECORDS or size > GROUP_BYTES:
                yield group
                group, size = [], 0
        yield group

    def _pass_stored(self, record: Record, content: Content, payload: Payload, data: bytes) -> None:
        """Pass on a record whose content is stored, with the thumbnail that its point lacks."""
        thumbnail = None
        if self.thumbnails is not None and self.thumbnails.lacks(content.id, payload):
            try:
                image, _ = decode_image(data, printable(record.key))
            except ImageError as error:
                self._failed.append(FailedRecord(record, error, content.sha256))
                return
            thumbnail = self.thumbnails.write(content.id, draw_thumbnail(image, THUMBNAIL_SIZE))
        self.on_stored(StoredContent(record, content.id, payload, thumbnail))

    def finish(self, content: Content, outcome: EmbeddedImage | ImageError) -> Iterator[Outcome]:
        """Yield the point of a content that was embedded, or the failures of its records."""
        records = self._embedding.pop(content.id)
        if isinstance(outcome, ImageError):
            yield from (FailedRecord(record, outcome, content.sha256) for record in records)
            return
        thumbnail = None
        if self.thumbnails is not None and outcome.thumbnail is not None:
            thumbnail = self.thumbnails.write(content.id, outcome.thumbnail)
        image = {"width": outcome.width, "height": outcome.height, "mime": outcome.mime}
        payload = make_payload(
            {"sha256": content.sha256, "bytes": content.bytes, **image},
            list({record.key: location_of(record) for record in records}.values()),
            describe(records[0]),
            thumbnail,
            shards=[record.shard for record in records if record.shard],
            llama_index=self.llama_index,
        )
        yield NewPoint(Point(content.id, outcome.vector, payload), records)
