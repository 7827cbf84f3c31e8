"""One indexing run: find the files, skip the unchanged, read and hash, skip the stored, embed, write, settle.

A run may be killed at any moment: everything that it has stored is correct, and the next run does the rest. The new
content of a file is stored before the old content is deleted, and a file that two points name is read again.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import EmbeddedImage
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.images.load import decode_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles
from cocoa_embed.integrations.qdrant.index_state import Content, IndexState, description_digest
from cocoa_embed.integrations.qdrant.index_summary import Counts
from cocoa_embed.integrations.qdrant.points import ImageFile, make_payload
from cocoa_embed.integrations.qdrant.read_files import ReadFile, read_file
from cocoa_embed.integrations.qdrant.settle import is_missing, settle
from cocoa_embed.integrations.qdrant.stores.base import Point, Store
from cocoa_embed.integrations.qdrant.thumbnails import THUMBNAIL_SIZE, ThumbnailFolder
from cocoa_embed.integrations.qdrant.writer import Writer


class NewContent(NamedTuple):
    """A content that is being embedded."""

    id: str
    sha256: str
    bytes: int


@dataclass
class IndexRun:
    """One run over image files."""

    files: ImageFiles
    store: Store
    encoder: Encoder
    state: IndexState
    batch_size: int
    thumbnails: ThumbnailFolder | None = None
    on_file_done: Callable[[], object] = lambda: None
    counts: Counts = field(default_factory=Counts)
    _embedding: dict[str, list[tuple[ImageFile, float]]] = field(default_factory=dict)
    """The files, with their mtimes, of each content that is being embedded."""

    def run(self, *, prune: bool) -> None:
        """Bring the collection up to date with the files.

        :param prune: Whether to remove files that no longer exist from the index.
        :raises CocoaError: If the store fails.
        """
        changed = self._skip_unchanged(self.files)
        new = self._skip_stored(read_ahead(read_file, changed))
        size = None if self.thumbnails is None else THUMBNAIL_SIZE
        self._write(self.encoder.stream_images(new, batch_size=self.batch_size, thumbnail_size=size))
        settle(self.files, self.store, self.state, self.counts, prune=prune)

    def _skip_unchanged(self, files: Iterable[ImageFile]) -> Iterator[ImageFile]:
        """Yield the files with another size or mtime than when they were indexed, and those that lack a thumbnail."""
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
        self, files: Iterable[tuple[ImageFile, Future[ReadFile | ImageError]]]
    ) -> Iterator[tuple[NewContent, bytes]]:
        """Yield each new content once; record the files whose content is stored, and those that cannot be read."""
        for file, reading in files:
            read = reading.result()
            if isinstance(read, ImageError):
                self._fail(file, read)
            elif read.id in self.state:
                self._record_stored(file, read)
            elif read.id in self._embedding:
                self._embedding[read.id].append((file, read.mtime))
                continue  # it is done when its content is
            else:
                self._embedding[read.id] = [(file, read.mtime)]
                yield NewContent(read.id, read.sha256, len(read.data)), read.data
                continue
            self.on_file_done()

    def _record_stored(self, file: ImageFile, read: ReadFile) -> None:
        """Record that a file holds a stored content."""
        if self.thumbnails is not None and self._lacks_thumbnail(read.id):
            try:
                image, _ = decode_image(read.data, printable(file.path))
            except ImageError as error:
                self._fail(file, error)
                return
            jpeg = draw_thumbnail(image, THUMBNAIL_SIZE)
            self.state.set_thumbnail(read.id, self.thumbnails.write(read.id, jpeg))
        path = file.stored_path
        id_before = self.state.id_of(path)
        content = self.state.contents[read.id]
        is_known = any(location.path == path for location in content.locations)
        self.state.remove_missing(read.id, lambda path: is_missing(path, self.files))
        self.state.attach(read.id, file.location(read.mtime))
        if id_before not in (None, read.id):
            self.counts.replaced.add(path)
        elif not is_known and not content.is_new:
            self.counts.updated.add(path)

    def _write(self, contents: Iterable[tuple[NewContent, EmbeddedImage | ImageError]]) -> None:
        """Store the embedded contents and record the files that hold them."""
        with Writer(self.store) as writer:
            for content, embedded in contents:
                files = self._embedding.pop(content.id)
                if isinstance(embedded, ImageError):
                    for file, _ in files:
                        self._fail(file, embedded)
                        self.state.detach(file.stored_path)
                else:
                    writer.add(self._make_point(content, files, embedded))
                for _ in files:
                    self.on_file_done()

    def _make_point(self, content: NewContent, files: list[tuple[ImageFile, float]], embedded: EmbeddedImage) -> Point:
        """Return the point of a new content and record its files."""
        locations = [file.location(mtime) for file, mtime in files]
        replaced = {location.path for location in locations if self.state.id_of(location.path) is not None}
        self.counts.replaced |= replaced
        self.counts.indexed += not replaced
        self.counts.embedded += 1
        description = files[0][0].description
        thumbnail = None
        if self.thumbnails is not None and embedded.thumbnail is not None:
            thumbnail = self.thumbnails.write(content.id, embedded.thumbnail)
        digest = description_digest(description)
        stored = Content(content.bytes, locations, digest, description["caption_source"], thumbnail, is_new=True)
        self.state.add(content.id, stored)
        payload = make_payload(
            locations=locations,
            description=description,
            sha256=content.sha256,
            bytes=content.bytes,
            width=embedded.width,
            height=embedded.height,
            mime=embedded.mime,
            thumbnail=thumbnail,
        )
        return Point(content.id, embedded.vector, payload)

    def _lacks_thumbnail(self, id_: str) -> bool:
        """Return whether a thumbnail is wanted that does not exist or that the payload does not name."""
        if self.thumbnails is None:
            return False
        path = self.thumbnails.path(id_)
        return self.state.contents[id_].thumbnail != str(path) or not path.exists()

    def _fail(self, file: ImageFile, error: ImageError) -> None:
        self.counts.failed.append({"path": str(file.path), "reason": error.reason})
