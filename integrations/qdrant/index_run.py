"""One pass over image files on their way to a store.

Files that are as they were are passed over; others are read; content that is stored already is not embedded again. At
the end the points are brought up to date whose files have changed, moved or gone. What holds the points is a
``Store``; nothing here knows of Qdrant.

A run may be ended at any moment: what it has stored is right, and the next run does the rest. A file's new content is
stored before its old content is removed; a file that two contents name is read again.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.jobs import EmbeddedImage
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.images.load import decode_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles
from cocoa_embed.integrations.qdrant.index_state import Content, Ledger, words_digest
from cocoa_embed.integrations.qdrant.points import (
    Description,
    ImageRecord,
    Payload,
    Place,
    changed_payload,
    payload,
    storable,
)
from cocoa_embed.integrations.qdrant.read_files import ReadFile, read_file
from cocoa_embed.integrations.qdrant.stores.base import Point, Store, batches
from cocoa_embed.integrations.qdrant.thumbnails import THUMBNAIL_SIZE, ThumbnailFolder, remove_thumbnail
from cocoa_embed.integrations.qdrant.writer import Writer

PAYLOADS_AT_ONCE = 256


class NewContent(NamedTuple):
    """A content on its way through the model."""

    id: str
    sha256: str
    bytes: int


@dataclass
class Counts:
    """What became of the files. Each counts once: as one of these, or as unchanged."""

    indexed: int = 0
    """Files with content that was not stored."""
    updated: set[str] = field(default_factory=set)
    """The paths of files whose content was stored, and which say something new of it: where it is, or words."""
    replaced: set[str] = field(default_factory=set)
    """The paths of files that hold something else than when they were indexed."""
    pruned: int = 0
    """Files that are gone, and were forgotten."""
    embedded: int = 0
    """Contents that have gone through the model."""
    failed: list[dict[str, str]] = field(default_factory=list)


@dataclass
class IndexRun:
    """One pass over files."""

    files: ImageFiles
    store: Store
    encoder: Encoder
    ledger: Ledger
    batch_size: int
    thumbnails: ThumbnailFolder | None = None
    tick: Callable[[], object] = lambda: None
    """Called once for each file that is done."""
    counts: Counts = field(default_factory=Counts)
    _waiting: dict[str, list[tuple[Description, float]]] = field(default_factory=dict)
    """The files, with their times, that hold a content which the model has not yet embedded."""

    def add(self) -> None:
        """Store what the files hold, as far as it is new.

        :raises CocoaError: If it cannot be stored.
        """
        size = None if self.thumbnails is None else THUMBNAIL_SIZE
        new = self.encoder.stream_images(self._new_contents(), batch_size=self.batch_size, thumbnail_size=size)
        with Writer(self.store) as writer:
            for content, embedded in new:
                holders = len(self._waiting[content.id])
                if isinstance(embedded, ImageError):
                    for file, _ in self._waiting.pop(content.id):
                        self._fail(file, embedded.reason)
                        self.ledger.release(storable(str(file.path)))
                else:
                    writer.add(self._point(content, embedded))
                for _ in range(holders):
                    self.tick()

    def settle(self, *, prune: bool) -> None:
        """Bring the stored points up to date: who holds them, and the words about them.

        :param prune: Whether to forget files that are gone; a content that no file holds is removed then.
        :raises CocoaError: If it cannot be stored.
        """
        if prune:
            self._prune()
        self._pass_on()
        words = self._new_words()
        changed = dict(self.ledger.changes())
        abandoned = {id_ for id_, content in changed.items() if not content.places}
        self._overwrite([id_ for id_ in {**changed, **words} if id_ not in abandoned], words)
        self._delete(sorted(abandoned))

    def _overwrite(self, ids: Sequence[str], words: Mapping[str, Payload]) -> None:
        """Store who holds contents now, with new words where there are some."""
        for some in batches(ids, PAYLOADS_AT_ONCE):
            for id_, stored in self.store.retrieve(some).items():
                content = self.ledger.contents[id_]
                described = changed_payload(
                    stored, places=content.places, words=words.get(id_), thumbnail=content.thumbnail
                )
                self.store.overwrite_payload(id_, described)

    def _delete(self, ids: Sequence[str]) -> None:
        """Remove contents that no file holds."""
        for some in batches(ids, PAYLOADS_AT_ONCE):
            self.store.delete(some)
            for id_ in some:
                remove_thumbnail(id_, self.ledger.contents[id_].thumbnail)

    def _new_contents(self) -> Iterator[tuple[NewContent, bytes]]:
        """Yield the contents that are not stored, once each; deal with every other file on the way."""
        for file, reading in read_ahead(read_file, self._changed()):
            read = reading.result()
            if isinstance(read, ImageError):
                self._fail(file, read.reason)
            elif read.id in self.ledger:
                self._hold(file, read)
            elif read.id in self._waiting:
                self._waiting[read.id].append((file, read.mtime))
                continue  # it is done when its content is
            else:
                self._waiting[read.id] = [(file, read.mtime)]
                yield NewContent(read.id, read.sha256, len(read.data)), read.data
                continue
            self.tick()

    def _changed(self) -> Iterator[Description]:
        """Yield the files that are not as they were when they were indexed, and those that lack a thumbnail."""
        for file in self.files:
            path = storable(str(file.path))
            try:
                status = os.stat(file.path)
            except OSError:
                yield file  # reading it will say what is wrong
                continue
            is_known = self.ledger.is_unchanged(path, status.st_mtime, status.st_size)
            if is_known and not self._lacks_thumbnail(str(self.ledger.owner(path))):
                self.tick()
            else:
                yield file

    def _hold(self, file: Description, read: ReadFile) -> None:
        """Note that a file holds a content that is stored."""
        if self.thumbnails is not None and self._lacks_thumbnail(read.id):
            try:
                image, _ = decode_image(read.data, printable(file.path))
            except ImageError as error:
                self._fail(file, error.reason)
                return
            jpeg = draw_thumbnail(image, THUMBNAIL_SIZE)
            self.ledger.show_by(read.id, self.thumbnails.write(read.id, jpeg))
        place = place_of(file, read.mtime)
        before = self.ledger.owner(place.path)
        content = self.ledger.contents[read.id]
        is_new_holder = all(other.path != place.path for other in content.places)
        self.ledger.forget(read.id, self._is_missing)
        self.ledger.hold(read.id, place)
        if before not in (None, read.id):
            self.counts.replaced.add(place.path)
        elif is_new_holder and not content.is_new:
            self.counts.updated.add(place.path)

    def _point(self, content: NewContent, embedded: EmbeddedImage) -> Point:
        """Return the point of a new content, and note the files that hold it."""
        holders = self._waiting.pop(content.id)
        places = [place_of(file, mtime) for file, mtime in holders]
        changed = {place.path for place in places if self.ledger.owner(place.path) is not None}
        self.counts.replaced |= changed
        self.counts.indexed += not changed
        self.counts.embedded += 1
        words = holders[0][0].words
        thumbnail = None
        if self.thumbnails is not None and embedded.thumbnail is not None:
            thumbnail = self.thumbnails.write(content.id, embedded.thumbnail)
        self.ledger.add(
            content.id, Content(content.bytes, places, words_digest(words), words["words_from"], thumbnail, is_new=True)
        )
        record = ImageRecord(
            places=places,
            words=words,
            sha256=content.sha256,
            bytes=content.bytes,
            width=embedded.width,
            height=embedded.height,
            mime=embedded.mime,
            thumbnail=thumbnail,
        )
        return Point(content.id, embedded.vector, payload(record))

    def _prune(self) -> None:
        """Forget the files that are gone of those that the run is about."""
        for id_ in self.ledger.contents:
            self.counts.pruned += self.ledger.forget(id_, self._is_missing)

    def _pass_on(self) -> None:
        """Where the first of several files that hold a content is gone, forget it, so that the next speaks for it."""
        for id_, content in self.ledger.contents.items():
            if len(content.places) > 1 and self._is_missing(content.places[0].path):
                if not all(is_gone(other.path) for other in content.places[1:]):
                    self.ledger.forget(id_, self._is_missing)

    def _is_missing(self, path: str) -> bool:
        """Tell whether a file is gone that would be among those of the run."""
        return self.files.covers(path) and is_gone(path)

    def _lacks_thumbnail(self, id_: str) -> bool:
        """Tell whether a thumbnail is asked for that is not there, or that the payload does not name."""
        if self.thumbnails is None:
            return False
        named = self.ledger.contents[id_].thumbnail == str(self.thumbnails.path(id_))
        return not named or not self.thumbnails.has(id_)

    def _new_words(self) -> dict[str, Payload]:
        """Return what ``metadata.jsonl`` files say of stored contents, by id, where something else is stored."""
        words: dict[str, Payload] = {}
        failed = {failure["path"] for failure in self.counts.failed}
        for file in (file for file in self.files if str(file.path) not in failed):
            path = storable(str(file.path))
            id_ = self.ledger.owner(path)
            if id_ is None or self.ledger.contents[id_].places[0].path != path:
                continue
            if self._says_something_new(file, self.ledger.contents[id_]):
                words[id_] = file.words
                if not self.ledger.contents[id_].is_new and path not in self.counts.replaced:
                    self.counts.updated.add(path)
        return words

    def _says_something_new(self, file: Description, content: Content) -> bool:
        """Tell whether the words about a file are others than those stored with its content.

        No words are something new where the file that gave those stored has none now, or is gone.
        """
        if file.words_from is None:
            source = content.words_from
            return source is not None and (source in file.silent or self._is_missing(source))
        return words_digest(file.words) != content.words

    def _fail(self, file: Description, reason: str) -> None:
        self.counts.failed.append({"path": str(file.path), "reason": reason})


def place_of(file: Description, mtime: float) -> Place:
    """Return a file as a payload names it."""
    return Place(storable(str(file.path)), storable(file.relative_path), mtime)


def is_gone(path: str) -> bool:
    r"""Tell whether there is no file at a path, given as a payload names it: with ``\udcNN`` for undecodable bytes.

    What cannot be looked at, for want of permission or of a network, is not gone.
    """
    undecoded = re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), path)
    return all(is_no_file(spelling) for spelling in {path, undecoded})


def is_no_file(path: str) -> bool:
    """Tell whether it is certain that there is no file at a path."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
