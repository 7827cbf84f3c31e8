"""Which files hold which content: read from the collection before a run, updated by the run. No input or output.

A content has the id of its point. Paths are as payloads have them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cocoa_embed.integrations.qdrant.points import FileLocation, Payload, stored_locations

DESCRIPTION_KEYS = ("caption", "metadata", "caption_source")
STATE_KEYS = ("sha256", "bytes", "paths", "relative_paths", "mtimes", "thumbnail", *DESCRIPTION_KEYS)
"""The payload keys that the state is read from."""

MTIME_TOLERANCE = 1e-6
"""Seconds; a stored mtime has passed through JSON."""


@dataclass(slots=True)
class Content:
    """One content and the files that hold it."""

    size: int
    """In bytes."""
    locations: dict[str, FileLocation]
    """By path; the first file describes the content."""
    description_digest: bytes
    """Of the stored caption and metadata."""
    caption_source: str | None = None
    """The ``metadata.jsonl`` that they come from."""
    thumbnail: str | None = None
    """The path of a small copy."""
    has_changed: bool = False
    """Whether the stored payload is out of date: it has other locations or another thumbnail."""
    is_new: bool = False
    """Whether this run has stored it."""


@dataclass
class IndexState:
    """The contents of a collection by id."""

    contents: dict[str, Content] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    """The id of the content that each file had when it was last read, by path."""
    _conflicts: dict[str, set[str]] = field(default_factory=dict)
    """Other contents stored with a path: a run was killed before it had updated them."""

    @classmethod
    def read(cls, points: Iterable[tuple[str, Mapping[str, Any]]]) -> "IndexState":
        """Return the state of a collection from the ids and payloads of its points; foreign points are skipped."""
        state = cls()
        for id_, payload in points:
            if not payload.get("sha256"):
                continue
            locations = {location.path: location for location in stored_locations(payload)}
            digest = description_digest({key: payload.get(key) for key in DESCRIPTION_KEYS})
            source, thumbnail = payload.get("caption_source"), payload.get("thumbnail")
            state.contents[id_] = Content(payload.get("bytes", 0), locations, digest, source, thumbnail)
            for path in locations:
                if state.ids.setdefault(path, id_) != id_:
                    state._conflicts.setdefault(path, set()).add(id_)
        return state

    def unchanged_id(self, path: str, mtime: float, size: int) -> str | None:
        """Return the id of a file's content if the file has the mtime and the size that it had when it was indexed."""
        id_ = self.ids.get(path)
        if id_ is None or path in self._conflicts or self.contents[id_].size != size:
            return None
        location = self.contents[id_].locations.get(path)
        return id_ if location is not None and abs(location.mtime - mtime) < MTIME_TOLERANCE else None

    def add(self, id_: str, content: Content) -> None:
        """Add a content that was just stored; its files no longer hold any other content."""
        self.contents[id_] = content
        for path in content.locations:
            self.detach(path, id_)

    def attach(self, id_: str, location: FileLocation) -> None:
        """Record that a file holds a stored content, and no other."""
        self.detach(location.path, id_)
        content = self.contents[id_]
        known = content.locations.get(location.path)
        if known is None or abs(known.mtime - location.mtime) >= MTIME_TOLERANCE:
            content.locations[location.path] = location
            content.has_changed = True

    def detach(self, path: str, new_id: str | None = None) -> None:
        """Record that a file holds no stored content, or only the content ``new_id``."""
        for other in {self.ids.pop(path, None), *self._conflicts.pop(path, ())} - {None, new_id}:
            self._remove(path, str(other))
        if new_id is not None:
            self.ids[path] = new_id

    def remove_missing(self, id_: str, is_missing: Callable[[str], bool]) -> int:
        """Remove the files of a content that no longer exist, and return their number."""
        missing = list(filter(is_missing, self.contents[id_].locations))
        for path in missing:
            self._remove(path, id_)
            if self.ids.get(path) == id_:
                del self.ids[path]
        return len(missing)

    def _remove(self, path: str, id_: str) -> None:
        content = self.contents[id_]
        content.locations.pop(path, None)
        content.has_changed = True


def description_digest(description: Payload) -> bytes:
    """Return 8 bytes that identify a caption and metadata; 1 and true differ, the order of keys does not matter."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=8).digest()
