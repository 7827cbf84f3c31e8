"""What a source of images yields: shards of records, each read, skipped or completed as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

from cocoa_embed.data.rows import ArrowImage

LARGEST_INTEGER = 2**63 - 1
"""The largest integer that Qdrant stores as it is."""
MOST_LEVELS = 100
"""How deeply lists and objects may be nested in a value. Qdrant Edge reads 127 levels of a payload."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of sources; each kind of source uses those that concern it."""

    allowed_hosts: tuple[str, ...] = ()
    """The hosts from which web addresses are fetched, as ``Fetcher`` takes them."""
    every: float = 10.0
    """Seconds between two frames of a video."""
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders to pass over, as in a ``.gitignore`` file, such as ``*_small.jpg`` or ``drafts/``.
    System folders and companions of other files are always passed over."""
    include: frozenset[str] = frozenset()
    """The kinds of files (``KINDS`` of ``open.py``) that are read in a folder in addition to its photographs."""


@dataclass(frozen=True)
class Record:
    """One image of a source."""

    key: str
    """Names the image on this machine: an absolute path, ``/data/a.tar#0001.jpg``, ``/data/report.pdf#page=3``,
    ``s3://bucket/a.jpg``."""
    relative_key: str
    """The key below the source's root."""
    read: Callable[[], bytes]
    """Returns the bytes of an image file; raises an ``ImageError`` if they cannot be read."""
    mtime: float = 0.0
    """When the file that holds the image was changed, in seconds since 1970; 0 where that is unknown."""
    size: int | None = None
    """Bytes of the image's own file; None for an image inside a shard, and where that is unknown."""
    shard: str | None = None
    """The key of the archive, table or document that holds the image; None if it is a file of its own."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Values that ``as_json`` returns: the caption as ``text``, and other columns."""
    metadata_source: str | None = None
    """The file that the metadata is from; None if the image has none."""
    checked_sources: frozenset[str] = frozenset()
    """Metadata files, read without an error, that could describe the image. A stored description that came from one of
    them is removed if they no longer have it."""


@dataclass(frozen=True)
class Shard:
    """Records that are read together: the files of a folder, an archive, a table, a document."""

    key: str
    """The name of the shard: an absolute path or a URL."""
    records: Callable[[], Iterator[Record]]
    """Yields the records in order; raises an ``ImageError`` if the shard cannot be read, or not to its end."""
    version: str = ""
    """Changes when any of the records may have changed; an unchanged shard is skipped. Empty: the records are checked
    one by one."""


class Source(Protocol):
    """One of the places that a run indexes or embeds."""

    @property
    def name(self) -> str:
        """The place: an absolute path or a URL."""
        ...

    def shards(self) -> Iterator[Shard]:
        """Yield the shards in order, lazily."""
        ...

    def covers(self, key: str) -> bool:
        """Return whether the source would have a record of this key, if it existed."""
        ...

    def is_deleted(self, key: str) -> bool:
        """Return whether there is certainly no record of this key any more; False where that cannot be checked."""
        ...


def is_below(key: str, root: str) -> bool:
    """Return whether a path or an address is in a folder."""
    return key.startswith(root.rstrip("/") + "/")


def relative_key(key: str, root: str | None) -> str:
    """Return a key below a folder or an address; the name of the file if it is elsewhere."""
    if root is None or not is_below(key, root):
        return PurePosixPath(key).name
    return key[len(root.rstrip("/")) + 1 :]


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a table as JSON values that Qdrant can store.

    Dates and integers of more than 64 bits, which Qdrant would round, become strings; bytes, images inside tables,
    numbers that are not finite and values of more than ``MOST_LEVELS`` levels become null.
    """
    shallow = {name: None if _is_deeper(value, MOST_LEVELS) else value for name, value in values.items()}
    text = json.dumps(shallow, default=_text_or_null)
    result: dict[str, Any] = json.loads(text, parse_int=_integer_or_digits, parse_constant=lambda _: None)
    return result


def _text_or_null(value: object) -> str | None:
    return None if isinstance(value, bytes | bytearray | ArrowImage) else str(value)


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _integer_or_digits(digits: str) -> int | str:
    return number if abs(number := int(digits)) <= LARGEST_INTEGER else digits


def storable(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    r"""Return a JSON value with valid Unicode, as a server requires.

    Undecodable bytes of a file name, which Python has as lone surrogates, become ``\udcNN``.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {storable(key): storable(element) for key, element in value.items()}
    if isinstance(value, list):
        return [storable(element) for element in value]
    return value
