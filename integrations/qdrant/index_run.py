"""One indexing run over image files: skip the unchanged, read and hash, skip the stored, embed, write.

A run may be killed at any moment: everything that it has stored is correct, and the next run does the rest. The new
content of a file is stored before the old content is deleted, and a file that two points name is read again.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import EmbeddedImage
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.images.load import FileContent, decode_image, read_stable_file
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles
from cocoa_embed.integrations.qdrant.index_state import Content, IndexState, description_digest
from cocoa_embed.integrations.qdrant.points import FileLocation, ImageFile, make_payload, point_id
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.integrations.qdrant.thumbnails import THUMBNAIL_SIZE, ThumbnailFolder

BATCH_POINTS = 64
"""Points per write."""


@dataclass(frozen=True)
class IndexSummary:
    """The result of an indexing run. Every file counts once: indexed, unchanged, updated, replaced or failed."""

    collection: str
    indexed: int
    """Files with new content."""
    unchanged: int
    """Files with the same content as before, or the same as another new file of this run."""
    updated: int
    """Files whose content was stored already, with a new path, caption or metadata."""
    replaced: int
    """Files with other content than before; the old point is deleted unless another file has its content."""
    pruned: int
    """Files that no longer exist and were removed from the index."""
    failed: list[dict[str, str]]
    """Files that could not be used, as ``{"path", "reason"}``."""
    skipped: int
    """Files and folders that were passed over."""
    skipped_reasons: dict[str, int]
    """Their numbers by the reason: ``system folder``, ``companion of another file``, ``cache``, ``excluded``."""
    seconds: float
    """Without loading the model."""
    images_per_second: float
    """Images embedded and stored per second."""


class ContentKey(NamedTuple):
    """What identifies a content."""

    id: str
    sha256: str
    bytes: int


@dataclass
class IndexRun:
    """One run over image files, and what it has done so far."""

    files: ImageFiles
    store: Store
    encoder: Encoder
    state: IndexState
    thumbnails: ThumbnailFolder | None = None
    on_file_done: Callable[[], object] = lambda: None
    outcomes: dict[str, Literal["indexed", "updated", "replaced"]] = field(default_factory=dict)
    """What was done with a file, by path; a file that is not here is unchanged or has failed."""
    pruned: int = 0
    embedded: int = 0
    """Contents that the model has embedded."""
    failed: list[dict[str, str]] = field(default_factory=list)
    _embedding: dict[str, list[tuple[ImageFile, FileLocation]]] = field(default_factory=dict)
    """The files of each content that is being embedded."""

    def store_new_content(self, batch_size: int) -> None:
        """Embed and store the new contents, and record in the state which files hold which content.

        :param batch_size: The maximum number of images in a batch.
        :raises CocoaError: If the store fails.
        """
        changed = self._skip_unchanged(self.files)
        new = self._skip_stored(read_ahead(read_file, changed))
        size = None if self.thumbnails is None else THUMBNAIL_SIZE
        embedded = self.encoder.stream_images(new, batch_size=batch_size, thumbnail_size=size)
        write_points(self.store, self._points(embedded))

    def summary(self, collection: str, seconds: float) -> IndexSummary:
        """Return the summary of the finished run."""
        counts = Counter(self.outcomes.values())
        return IndexSummary(
            collection=collection,
            indexed=counts["indexed"],
            unchanged=len(self.files) - counts.total() - len(self.failed),
            updated=counts["updated"],
            replaced=counts["replaced"],
            pruned=self.pruned,
            failed=sorted([*self.failed, *self.files.unlisted], key=lambda failure: failure["path"]),
            skipped=self.files.passed_over.counts.total(),
            skipped_reasons=dict(self.files.passed_over.counts),
            seconds=seconds,
            images_per_second=self.embedded / seconds,
        )

    def _skip_unchanged(self, files: Iterable[ImageFile]) -> Iterator[ImageFile]:
        """Yield the files whose size or mtime has changed since they were indexed, and those without a thumbnail."""
        for file in files:
            try:
                status = os.stat(file.path)
            except OSError:
                yield file  # reading it reports the reason
                continue
            id_ = self.state.unchanged_id(file.stored_path, status.st_mtime, status.st_size)
            if id_ is None or self._lacks_thumbnail(id_):
                yield file
            else:
                self.on_file_done()

    def _skip_stored(
        self, files: Iterable[tuple[ImageFile, Future[tuple[ContentKey, FileContent]]]]
    ) -> Iterator[tuple[ContentKey, bytes]]:
        """Yield each new content once; record the files whose content is stored, and those that cannot be read."""
        for file, reading in files:
            try:
                content, (data, mtime, _) = reading.result()
            except ImageError as error:
                self._fail(file, error)
                self.on_file_done()
                continue
            location = file.location(mtime)
            if content.id in self.state.contents:
                self._record_stored(file, location, content.id, data)
                self.on_file_done()
            elif content.id in self._embedding:
                self._embedding[content.id].append((file, location))
            else:
                self._embedding[content.id] = [(file, location)]
                yield content, data

    def _record_stored(self, file: ImageFile, location: FileLocation, id_: str, data: bytes) -> None:
        """Record that a file holds a stored content."""
        content = self.state.contents[id_]
        if self.thumbnails is not None and self._lacks_thumbnail(id_):
            try:
                image, _ = decode_image(data, printable(file.path))
            except ImageError as error:
                self._fail(file, error)
                return
            content.thumbnail = self.thumbnails.write(id_, draw_thumbnail(image, THUMBNAIL_SIZE))
            content.has_changed = True
        id_before = self.state.ids.get(location.path)
        is_known = location.path in content.locations
        self.state.remove_missing(id_, self.files.misses)
        self.state.attach(id_, location)
        if id_before not in (None, id_):
            self.outcomes[location.path] = "replaced"
        elif not is_known and not content.is_new:
            self.outcomes[location.path] = "updated"

    def _points(self, contents: Iterable[tuple[ContentKey, EmbeddedImage | ImageError]]) -> Iterator[Point]:
        """Yield the points of the embedded contents and record the files that hold them."""
        for content, embedded in contents:
            files = self._embedding.pop(content.id)
            if isinstance(embedded, ImageError):
                for file, location in files:
                    self._fail(file, embedded)
                    self.state.detach(location.path)
            else:
                locations = {location.path: location for _, location in files}
                yield self._make_point(content, locations, files[0][0], embedded)
            for _ in files:
                self.on_file_done()

    def _make_point(
        self, content: ContentKey, locations: dict[str, FileLocation], first: ImageFile, embedded: EmbeddedImage
    ) -> Point:
        """Return the point of a new content, described by its first file, and record its files."""
        replaced = locations.keys() & self.state.ids.keys()
        self.outcomes |= dict.fromkeys(replaced, "replaced") or {next(iter(locations)): "indexed"}
        self.embedded += 1
        description, thumbnail = first.description, None
        if self.thumbnails is not None and embedded.thumbnail is not None:
            thumbnail = self.thumbnails.write(content.id, embedded.thumbnail)
        digest = description_digest(description)
        stored = Content(content.bytes, locations, digest, first.caption_source, thumbnail, is_new=True)
        self.state.add(content.id, stored)
        image = {"width": embedded.width, "height": embedded.height, "mime": embedded.mime}
        fields = {"sha256": content.sha256, "bytes": content.bytes, **image}
        payload = make_payload(fields, list(locations.values()), description, thumbnail)
        return Point(content.id, embedded.vector, payload)

    def _lacks_thumbnail(self, id_: str) -> bool:
        """Return whether a thumbnail is wanted that does not exist or that the payload does not name."""
        if self.thumbnails is None:
            return False
        path = self.thumbnails.path(id_)
        return self.state.contents[id_].thumbnail != str(path) or not path.exists()

    def _fail(self, file: ImageFile, error: ImageError) -> None:
        self.failed.append({"path": str(file.path), "reason": error.reason})


def read_file(file: ImageFile) -> tuple[ContentKey, FileContent]:
    """Read and hash a file.

    :raises ImageError: If it cannot be read.
    """
    read = read_stable_file(file.path)
    sha256 = hashlib.sha256(read.data).hexdigest()
    return ContentKey(point_id(sha256), sha256, read.size), read


def write_points(store: Store, points: Iterable[Point]) -> None:
    """Store points in batches in threads, ``store.parallel`` at once; the next point waits while twice as many wait.

    After an exception, the batches that no thread has begun are not stored.

    :raises CocoaError: If a write fails.
    """
    remaining = iter(points)
    batches = iter(lambda: list(islice(remaining, BATCH_POINTS)), [])
    with closing(read_ahead(store.upsert, batches, workers=store.parallel)) as writes:
        for _, write in writes:
            write.result()
