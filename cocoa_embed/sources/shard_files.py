"""Files that hold many images, each file a shard: archives, tables, documents, videos; local or remote."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, BinaryIO, NamedTuple

from cocoa_embed.data.image_folder import without_blank_texts
from cocoa_embed.data.places import Place, is_gone, modified_at, version_of
from cocoa_embed.errors import CocoaError, ImageError, MissingExtraError, one_line, printable
from cocoa_embed.images.passed_over import PassedOver
from cocoa_embed.sources.base import Record, Shard, SourceOptions, as_json, is_below, relative_key, storable
from cocoa_embed.sources.files import files_of, is_deleted

READER = 3
"""The version of the readers. Increase it when files of any kind yield other records, captions or columns than before:
an index then reads each of them again once, and embeds only what is new."""

RECORDS_AHEAD = 16
"""Records that are read before they are consumed."""


class Kind(NamedTuple):
    """A kind of file that holds images."""

    name: str
    suffixes: tuple[str, ...]
    """In lower case."""
    read: Callable[[ShardFile], Iterator[Record]]
    """Yields the records in order; raises anything, after the good ones, if the file cannot be read to its end."""
    package: str
    """The package that reads it."""
    extra: str
    """The extra that installs the package."""
    settings: tuple[str, ...] = ()
    """The fields of ``SourceOptions`` that decide which records a file has."""
    is_versioned: bool = True
    """Whether a file that is unchanged has unchanged images."""
    read_one: Callable[[BinaryIO, str, str], bytes] | None = None
    """Returns the bytes of one image, given the opened file, its key, and the name of the image. None if the images are
    not in the file."""
    beside: Callable[[Place], Place | None] | None = None
    """Returns the place of another file that would describe the images; None if none could."""


@dataclass(frozen=True)
class ShardFile:
    """One file whose images are read together."""

    place: Place
    relative_key: str
    kind: Kind
    options: SourceOptions
    passed_over: PassedOver
    """Decides which files of an archive are passed over."""

    @property
    def key(self) -> str:
        """The absolute path or the address."""
        return str(self.place)

    @property
    def version(self) -> str:
        """A string that changes with the file, a file that describes it, and the settings that concern it.

        Empty if its images have their own versions.
        """
        if not self.kind.is_versioned:
            return ""
        try:
            settings = [str(getattr(self.options, name)) for name in self.kind.settings]
            return ":".join([*version_of(self.place)[1:], *settings, *self._version_beside()])
        except CocoaError:  # reading it reports the reason
            return "missing"

    def _version_beside(self) -> tuple[str, ...]:
        beside = None if self.kind.beside is None else self.kind.beside(self.place)
        try:
            return () if beside is None else version_of(beside)[1:]
        except CocoaError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return ()
            raise

    @cached_property
    def mtime(self) -> float:
        """When the file was changed, in seconds since 1970; 0 if that is unknown."""
        return modified_at(self.place)

    def records(self) -> Iterator[Record]:
        """Yield the images, which a thread reads ahead.

        :raises ImageError: If the file cannot be read, or not to its end.
        """
        images = self._read()
        pool = ThreadPoolExecutor(1, thread_name_prefix="cocoa-shard")
        try:
            waiting = deque(pool.submit(next, images, None) for _ in range(RECORDS_AHEAD))
            while (record := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, images, None))
                yield record
        finally:
            pool.shutdown(cancel_futures=True)
            images.close()

    def _read(self) -> Generator[Record]:
        good = 0
        self.passed_over.unread.discard(self.key)
        try:
            for record in self.kind.read(self):
                yield record
                good += 1
        except (ImageError, MissingExtraError):
            raise
        except Exception as error:  # remote file systems and decoders raise nearly anything
            after = f" after {good} image{'s' * (good > 1)}" if good else ""
            raise ImageError(printable(self.key), f"cannot be read{after} ({one_line(error)})") from error

    def make_record(self, name: str, content: bytes | ImageError, metadata: Mapping[str, Any]) -> Record:
        """Return the record of one image.

        :param name: Its name inside the file.
        :param content: The bytes of an image file, or the error that reading it raises.
        :param metadata: Values of any kind; those that JSON does not have become strings, or null.
        """
        return Record(
            key=f"{self.key}#{name}",
            relative_key=f"{self.relative_key}#{name}",
            read=partial(give, content),
            mtime=self.mtime,
            shard=self.key,
            metadata=json_values(metadata),
            metadata_source=self.key if metadata else None,
            checked_sources=frozenset({self.key}),
        )


@dataclass(frozen=True)
class ShardFiles:
    """A source: files of images, named one by one or found in a folder."""

    files: Sequence[tuple[Place, Kind]]
    options: SourceOptions
    passed_over: PassedOver
    root: str | None
    """The folder or the address where the files were found; None if they were named."""
    suffixes: tuple[str, ...]
    """The suffixes of the files that would have been found there."""

    @property
    def name(self) -> str:
        """The folder, or the first file."""
        return self.root or str(self.files[0][0])

    def shards(self) -> Iterator[Shard]:
        """Yield the files in order."""
        for place, kind in self.files:
            file = ShardFile(place, relative_key(str(place), self.root), kind, self.options, self.passed_over)
            if "exclude" in kind.settings:
                self.passed_over.unread.add(file.key)
            yield Shard(file.key, file.records, file.version)

    def covers(self, key: str) -> bool:
        """Return whether the key is that of an image in one of the files, or in one that could be among them."""
        files = files_of(key)
        if not self._keys.isdisjoint(files):
            return True
        root = None if self.root is None else storable(self.root)
        return root is not None and any(is_below(each, root) and each.lower().endswith(self.suffixes) for each in files)

    @cached_property
    def _keys(self) -> frozenset[str]:
        """The files, as payloads name them."""
        return frozenset(storable(str(place)) for place, _ in self.files)

    def is_deleted(self, key: str) -> bool:
        """Return whether the file that held the image is certainly gone."""
        if "://" not in key:
            return is_deleted(key)
        files = files_of(key)
        return files != [] and all(map(is_gone, files))


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as ``as_json`` does, without bytes.

    Without a ``text``, a ``caption`` becomes the text; null or blank ones do not count.
    """
    kept = {name: value for name, value in values.items() if not isinstance(value, bytes | bytearray)}
    kept = without_blank_texts(kept)
    if "text" not in kept and isinstance(kept.get("caption"), str):
        kept["text"] = kept.pop("caption")
    return as_json(kept)


def give(content: bytes | ImageError) -> bytes:
    """Return the bytes of an image, or raise the error given instead of them."""
    if isinstance(content, ImageError):
        raise content
    return content
