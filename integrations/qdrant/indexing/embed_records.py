"""Turn the records of any source into points: read, hash, skip what is stored, embed, describe. Writes no points.

The caller decides what happens to the points: an indexing run merges them into a collection, and an embedding job
writes them to files.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import CaptionedImage, EmbeddedImage
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import CocoaError, ImageError, TransientImageError, one_line, printable
from cocoa_embed.images.load import decode_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.indexing.thumbnails import THUMBNAIL_SIZE, ThumbnailFolder
from cocoa_embed.integrations.qdrant.points import (
    Payload,
    caption_of,
    describe,
    location_of,
    make_payload,
    point_id,
)
from cocoa_embed.integrations.qdrant.stores.base import BOTH, CAPTION_VECTOR, IMAGE, TOGETHER, NewVector, Point
from cocoa_embed.sources.base import Record, storable

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
    """New content that was embedded; its point names all ``records`` that hold it, and is described by the first."""

    point: Point
    records: list[Record]


class StoredContent(NamedTuple):
    """A record whose content already has a point."""

    record: Record
    id: str
    payload: Payload
    """The payload of the point, as ``stored`` returned it."""
    thumbnail: str | None
    """The path of a thumbnail that was missing and is drawn now."""
    vector: NewVector | None = None
    """A vector that embeds the record's caption, if that replaces the caption of the point."""


class FailedRecord(NamedTuple):
    """A record that cannot be used."""

    record: Record
    error: ImageError
    tried: str | None
    """A SHA-256 of what failed (``PointStream.tried``), if it would fail again; None if a later run may use the record,
    or its content is stored already."""


Outcome: TypeAlias = NewPoint | StoredContent | FailedRecord


def caption_with_image(record: Record, embed: str) -> str | None:
    """Return the caption that is embedded together with a record's image; None if there is none.

    :param embed: What is embedded for an image: one of ``EMBEDS``.
    """
    return caption_of(describe(record)) if embed == TOGETHER else None


def read_record(record: Record) -> tuple[Content, bytes]:
    """Read and hash a record.

    :raises ImageError: If it cannot be read.
    """
    data = record.read()
    sha256 = hashlib.sha256(data).hexdigest()
    return Content(point_id(sha256), sha256, len(data)), data


@dataclass(kw_only=True)
class PointStream:
    """Makes points of records, for one run.

    :param stored: Returns the payloads of those ids that have a point. Their content is not embedded.
    :param on_stored: Called with each record whose content is stored and which is not yielded.
    :param changes_caption: Returns whether a record gives stored content another caption. Vectors of the caption are
        then computed again.
    :param known_fault: Returns why the input that ``tried`` identifies could not be used before; it is not tried again.
    :param thumbnails: Where to write small copies.
    :param llama_index: Whether payloads have the fields that LlamaIndex's own ``QdrantVectorStore`` reads.
    :param embed: What is embedded for an image: one of ``EMBEDS``.
    """

    encoder: Encoder
    stored: Callable[[Sequence[str]], Mapping[str, Payload]] = lambda _: {}
    on_stored: Callable[[StoredContent], object] = lambda _: None
    changes_caption: Callable[[Payload, Record], bool] = lambda *_: False
    known_fault: Callable[[str], str | None] = lambda _: None
    thumbnails: ThumbnailFolder | None = None
    llama_index: bool = False
    embed: str = IMAGE
    _embedding: dict[str, list[Record]] = field(default_factory=dict, init=False)
    """The records of each content that is being embedded."""
    _embedded_again: dict[str, Payload] = field(default_factory=dict, init=False)
    """The payloads of those among them that are stored and are embedded again."""
    _captions: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    """The vectors of the captions of content that is being embedded."""
    _failed: deque[FailedRecord] = field(default_factory=deque, init=False)

    def run(self, records: Iterable[Record], batch_size: int = 32) -> Iterator[Outcome]:
        """Yield a point for each new content, stored content that is embedded again, and records that cannot be used.

        Records are read lazily, some batches ahead, and memory is bounded. Records with the same content that are in
        flight together share one point; a later copy is a second point with the same id, unless ``stored`` knows it.

        :param batch_size: The maximum number of images in a batch.
        :raises CocoaError: If the model does not embed what is asked for, or a thumbnail cannot be written.
        """
        size = None if self.thumbnails is None else THUMBNAIL_SIZE
        with ExitStack() as stack:
            reading = stack.enter_context(closing(read_ahead(read_record, records)))
            new = self._new_contents(reading)
            embedded = self.encoder.stream_images(new, batch_size=batch_size, thumbnail_size=size)
            for content, outcome in stack.enter_context(closing(cast("Generator[tuple[Content, Any]]", embedded))):
                yield from self._take_failures()
                yield from self._finish(content, outcome)
            yield from self._take_failures()

    def _take_failures(self) -> Iterator[FailedRecord]:
        """Yield the failures that were found since the last call."""
        while self._failed:
            yield self._failed.popleft()

    def _new_contents(
        self, reading: Iterable[tuple[Record, Future[tuple[Content, bytes]]]]
    ) -> Iterator[tuple[Content, bytes | CaptionedImage]]:
        """Yield each new content once; pass on the records whose content is stored, or which cannot be used."""
        for group in self._groups(reading):
            ids = {content.id for _, content, _ in group} - self._embedding.keys()
            payloads = self.stored(sorted(ids))
            captions = self._embed_captions(group, payloads) if self.embed == BOTH else {}
            for record, content, data in group:
                if content.id in self._embedding:
                    self._embedding[content.id].append(record)
                elif content.id in payloads:
                    payload = payloads[content.id]
                    if self.embed == TOGETHER and self.changes_caption(payload, record):
                        self._embedding[content.id], self._embedded_again[content.id] = [record], payload
                        yield content, self._image(record, data)
                    else:
                        self._pass_stored(record, content, payload, data, captions.get(record.key))
                elif reason := self.known_fault(tried := self.tried(record, content)):
                    self._failed.append(FailedRecord(record, ImageError(record.key, reason), tried))
                else:
                    self._embedding[content.id] = [record]
                    if record.key in captions:
                        self._captions[content.id] = captions[record.key]
                    yield content, self._image(record, data)

    def _image(self, record: Record, data: bytes) -> bytes | CaptionedImage:
        """Return what the model embeds of a record: the image, or image and caption."""
        caption = caption_with_image(record, self.embed)
        return data if caption is None else CaptionedImage(data, caption)

    def tried(self, record: Record, content: Content) -> str:
        """Return a SHA-256 of what the model embeds of a record: another caption may be accepted."""
        caption = caption_with_image(record, self.embed)
        return content.sha256 if caption is None else hashlib.sha256(f"{content.sha256} {caption}".encode()).hexdigest()

    def _embed_captions(
        self, group: Sequence[tuple[Record, Content, bytes]], payloads: Mapping[str, Payload]
    ) -> dict[str, np.ndarray]:
        """Return, by key, the vectors of the captions of records whose content is new, or gets another caption."""
        texts = {
            record.key: caption
            for record, content, _ in group
            if (caption := caption_of(describe(record))) is not None
            and content.id not in self._embedding
            and (content.id not in payloads or self.changes_caption(payloads[content.id], record))
        }
        inputs = [{"text": caption} for caption in texts.values()]
        try:
            return dict(zip(texts, self.encoder.embed_documents(inputs), strict=True)) if inputs else {}
        except ValueError as error:
            first = printable(next(iter(texts)))
            raise CocoaError(
                f"{self.encoder.name} does not accept the caption of {first}, or of one of {len(texts) - 1} images"
                f" after it ({one_line(error)})"
            ) from error

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

    def _pass_stored(
        self, record: Record, content: Content, payload: Payload, data: bytes, caption: np.ndarray | None
    ) -> None:
        """Pass on a record whose content is stored, with the thumbnail that its point lacks."""
        thumbnail = None
        if self.thumbnails is not None and self.thumbnails.lacks(payload):
            try:
                image, _ = decode_image(data, printable(record.key))
            except ImageError as error:
                self._failed.append(FailedRecord(record, error, None))
                return
            thumbnail = self.thumbnails.write(content.id, draw_thumbnail(image, THUMBNAIL_SIZE))
        vector = None if caption is None else NewVector(CAPTION_VECTOR, caption)
        self.on_stored(StoredContent(record, content.id, payload, thumbnail, vector))

    def _finish(self, content: Content, outcome: EmbeddedImage | ImageError) -> Iterator[Outcome]:
        """Yield the point of content that was embedded, or the failures of its records."""
        records = self._embedding.pop(content.id)
        stored, caption = self._embedded_again.pop(content.id, None), self._captions.pop(content.id, None)
        if isinstance(outcome, ImageError):
            is_lasting = stored is None and not isinstance(outcome, TransientImageError)
            tried = self.tried(records[0], content)  # the model was given the first record for all
            for record in records:
                is_tried = is_lasting and self.tried(record, content) == tried
                yield FailedRecord(record, outcome, tried if is_tried else None)
            return
        thumbnail = None
        if self.thumbnails is not None and outcome.thumbnail is not None:
            thumbnail = self.thumbnails.write(content.id, outcome.thumbnail)
        if stored is not None:
            first, *copies = records
            yield StoredContent(first, content.id, stored, thumbnail, NewVector("", outcome.vector))
            yield from (StoredContent(copy, content.id, stored, None) for copy in copies)
            return
        image = {"width": outcome.width, "height": outcome.height, "mime": outcome.mime}
        payload = make_payload(
            {"sha256": content.sha256, "bytes": content.bytes, **image},
            list({record.key: location_of(record) for record in records}.values()),
            describe(records[0]),
            thumbnail,
            shards=[storable(record.shard) for record in records if record.shard],
            llama_index=self.llama_index,
        )
        yield NewPoint(Point(content.id, outcome.vector, payload, caption), records)
