"""Which files hold which content: what a collection said before a run, and what the run found. No input or output.

A content is known by its point's id. Files are known by their paths as payloads hold them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cocoa_embed.integrations.qdrant.points import Payload, Place, stored_places

LEDGER_KEYS = ("sha256", "bytes", "paths", "relative_paths", "mtimes", "caption", "metadata", "words_from", "thumbnail")
"""The payload keys that a ledger is read from."""

MTIME_RESOLUTION = 1e-6
"""Seconds by which a file's time may differ from the stored one, which has passed through JSON."""


@dataclass(slots=True)
class Content:
    """What is known of one content."""

    size: int
    """In bytes."""
    places: list[Place]
    words: bytes
    """A digest of what is stored as its caption and metadata."""
    words_from: str | None = None
    """The ``metadata.jsonl`` that they are from."""
    thumbnail: str | None = None
    """The path of a small copy."""
    has_changed: bool = False
    """Whether its payload says something else than what is stored: other files, or another thumbnail."""
    is_new: bool = False
    """Whether this run has stored it."""


@dataclass
class Ledger:
    """The contents of a collection by id, and who holds them."""

    contents: dict[str, Content] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    """The id of the content that a path holds."""
    _rivals: dict[str, set[str]] = field(default_factory=dict)
    """Other contents that are stored with a path: a run was ended before it could settle which one the file holds."""

    @classmethod
    def read(cls, points: Iterable[tuple[str, Mapping[str, Any]]]) -> "Ledger":
        """Return the ledger of stored points, given by id and payload; points that others wrote are passed over."""
        ledger = cls()
        for id_, payload in points:
            if not payload.get("sha256"):
                continue
            words_from = payload.get("words_from")
            words = {
                "caption": payload.get("caption"),
                "metadata": payload.get("metadata") or {},
                "words_from": words_from,
            }
            places = stored_places(payload)
            ledger.contents[id_] = Content(
                int(payload.get("bytes") or 0), places, words_digest(words), words_from, payload.get("thumbnail")
            )
            for place in places:
                if ledger._owners.setdefault(place.path, id_) != id_:
                    ledger._rivals.setdefault(place.path, set()).add(id_)
        return ledger

    def __contains__(self, id_: str) -> bool:
        """Tell whether a content is stored."""
        return id_ in self.contents

    def owner(self, path: str) -> str | None:
        """Return the id of the content that a file held when it was last looked at; None if it is not known."""
        return self._owners.get(path)

    def is_unchanged(self, path: str, mtime: float, size: int) -> bool:
        """Tell whether a file is as it was when it was indexed, by its time and size."""
        id_ = self._owners.get(path)
        if id_ is None or path in self._rivals or self.contents[id_].size != size:
            return False
        return any(
            place.path == path and abs(place.mtime - mtime) < MTIME_RESOLUTION for place in self.contents[id_].places
        )

    def add(self, id_: str, content: Content) -> None:
        """Note a content that has just been stored with its files, which no longer hold anything else."""
        self.contents[id_] = content
        for place in content.places:
            self._take_from_others(place.path, id_)

    def hold(self, id_: str, place: Place) -> None:
        """Note that a file holds a content that is stored."""
        self._take_from_others(place.path, id_)
        content = self.contents[id_]
        known = [number for number, other in enumerate(content.places) if other.path == place.path]
        if not known:
            content.places.append(place)
        elif abs(content.places[known[0]].mtime - place.mtime) >= MTIME_RESOLUTION:
            content.places[known[0]] = place
        else:
            return
        content.has_changed = True

    def show_by(self, id_: str, thumbnail: str) -> None:
        """Note that a content has a new thumbnail."""
        self.contents[id_].thumbnail = thumbnail
        self.contents[id_].has_changed = True

    def release(self, path: str) -> None:
        """Note that a file holds nothing that is stored."""
        self._take_from_others(path, None)
        self._owners.pop(path, None)

    def forget(self, id_: str, is_gone: Callable[[str], bool]) -> int:
        """Forget those files of a content that are gone, and return how many they were."""
        content = self.contents[id_]
        gone = [place for place in content.places if is_gone(place.path)]
        for place in gone:
            self._remove(place.path, id_)
            if self._owners.get(place.path) == id_:
                del self._owners[place.path]
        return len(gone)

    def changes(self) -> Iterator[tuple[str, Content]]:
        """Yield the contents whose payloads say something else; where no file is left, that is a point too many."""
        yield from ((id_, content) for id_, content in self.contents.items() if content.has_changed)

    def _take_from_others(self, path: str, id_: str | None) -> None:
        others = {self._owners.get(path), *self._rivals.pop(path, ())} - {None, id_}
        for other in others:
            self._remove(path, str(other))
        if id_ is not None:
            self._owners[path] = id_

    def _remove(self, path: str, id_: str) -> None:
        content = self.contents[id_]
        content.places = [place for place in content.places if place.path != path]
        content.has_changed = True


def words_digest(words: Payload) -> bytes:
    """Return a digest of a caption and metadata in which 1 and true differ.

    :return: 8 bytes.
    """
    return hashlib.blake2b(json.dumps(words, sort_keys=True).encode(), digest_size=8).digest()
