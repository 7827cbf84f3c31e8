"""Change stored points by optimistic merges, so that concurrent indexers do not lose each other's changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.indexing.thumbnails import remove_thumbnail
from cocoa_embed.integrations.qdrant.points import (
    FileLocation,
    Payload,
    caption_of,
    describe,
    is_same_json,
    is_same_moment,
    location_of,
    make_payload,
    stored_locations,
)
from cocoa_embed.integrations.qdrant.stores.base import BOTH, CAPTION_VECTOR, IMAGE, NewVector
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Record, storable
from cocoa_embed.sources.files import is_deleted

BATCH_CHANGES = 256
"""Points that are changed together."""

ATTEMPTS = 50
"""How many times the merge of a batch is tried: of several writers, one succeeds each time."""

DESCRIPTION_KEYS = ("caption", "metadata", "caption_source")


@dataclass
class Change:
    """What a run changes about one stored point."""

    held: dict[str, Record] = field(default_factory=dict)
    """The records that hold the content, by their path in the payload."""
    removed: set[str] = field(default_factory=set)
    """Paths that no longer hold it."""
    thumbnail: str | None = None
    vectors: dict[str | None, NewVector] = field(default_factory=dict)
    """New vectors of the content, by the caption that they embed."""

    def hold(self, record: Record) -> None:
        """Add a record that holds the content."""
        path = storable(record.key)
        self.held[path] = record
        self.removed.discard(path)


@dataclass(eq=False)
class NamedPoint:
    """A stored point that names records of a group."""

    id: str
    payload: Payload
    locations: dict[str, FileLocation]
    """The locations of its content, by path."""
    is_reordered: bool = False

    @cached_property
    def first_existing(self) -> str:
        """The first path that exists."""
        return existing_first([*self.locations.values()])[0].path

    def has_to_change(self, path: str) -> bool:
        """Return whether an unchanged file may change the payload: it describes the content, or the order is stale."""
        is_stale = not self.is_reordered and self.first_existing != next(iter(self.locations))
        self.is_reordered |= is_stale
        return is_stale or path == self.first_existing

    def is_unchanged(self, record: Record) -> bool:
        """Return whether a record that it names has the size and mtime that it had when it was stored."""
        mtime = self.locations[storable(record.key)].mtime
        return record.size in (None, self.payload.get("bytes")) and is_same_moment(mtime, record.mtime)


@dataclass(frozen=True)
class Merger:
    """Applies changes to payloads."""

    is_missing: Callable[[str], bool] = lambda _: False
    """Returns whether a file that the run would have found is gone."""
    llama_index: bool = False
    """Whether payloads get the fields of LlamaIndex."""

    def apply(self, stored: Payload, change: Change, *, describes: bool = True) -> Payload | None:
        """Return the payload of a point after a change; None if no file holds its content any more.

        The first file that exists comes first and describes the content.

        :param describes: Whether the change may also replace the description.
        """
        locations = {each.path: each for each in stored_locations(stored) if each.path not in change.removed}
        for path, record in change.held.items():
            new = location_of(record)
            known = locations.get(path)
            locations[path] = new if known is None or not is_same_moment(known.mtime, new.mtime) else known
        if not locations:
            return None
        ordered = existing_first([*locations.values()])
        first = change.held.get(ordered[0].path)
        shards = [storable(record.shard) for record in change.held.values() if record.shard]
        return make_payload(
            stored,
            ordered,
            describe(first) if describes and first is not None and self.has_new_description(first, stored) else {},
            change.thumbnail,
            shards=shards,
            llama_index=self.llama_index,
        )

    def has_new_description(self, record: Record, stored: Payload) -> bool:
        """Return whether a record's caption and metadata differ from those stored with its content.

        A record without a description keeps the stored one, unless the file that gave it was read or deleted.
        """
        if record.metadata_source is None:
            source = stored.get("caption_source")
            return source is not None and (source in map(storable, record.checked_sources) or self.is_missing(source))
        return not is_same_json(describe(record), {key: stored.get(key) for key in DESCRIPTION_KEYS})

    def changes_caption(self, stored: Payload, record: Record) -> bool:
        """Return whether a point gets another caption when a record is added to those that hold its content."""
        change = Change()
        change.hold(record)
        after = self.apply(stored, change)
        return after is not None and caption_of(after) != caption_of(stored)

    def apply_with_vector(self, embed: str, stored: Payload, change: Change) -> tuple[Payload | None, NewVector | None]:
        """Return payload and vector of a point after a change, so that the vector embeds the payload's caption.

        A caption that is not embedded, because another process stores points at the same time, is left to the
        next run.

        :param embed: What the collection embeds.
        """
        after = self.apply(stored, change)
        if embed == IMAGE or after is None or (caption := caption_of(after)) == caption_of(stored):
            return after, None
        if embed == BOTH and caption is None:
            return after, NewVector(CAPTION_VECTOR, None)
        if caption not in change.vectors:
            return self.apply(stored, change, describes=False), None
        return after, change.vectors[caption]

    def merge(self, store: Store, changes: Mapping[str, Change]) -> list[str]:
        """Change stored points and wait until they are changed; points that no file holds are deleted.

        :param changes: The changes, by the id of the point.
        :returns: The ids of points that should have got a record but are gone: another process has deleted them.
        :raises CocoaError: If the store fails.
        """
        pending, lost, deleted = dict(changes), list[str](), dict[str, Payload]()
        for _ in range(ATTEMPTS):
            stored = store.retrieve([*pending])
            lost += [id_ for id_, change in pending.items() if change.held and id_ not in stored]
            for id_ in deleted.keys() - stored.keys():
                remove_thumbnail(id_, deleted.pop(id_).get("thumbnail"))
            after = {id_: self.apply_with_vector(store.embed, each, pending[id_]) for id_, each in stored.items()}
            pending = {id_: pending[id_] for id_ in stored if not is_same_json(after[id_][0], stored[id_])}
            if not pending:
                return lost
            deleted = {id_: stored[id_] for id_ in pending if after[id_][0] is None}
            vectors = {id_: vector for id_ in pending if (vector := after[id_][1])}
            store.replace_payloads([(id_, stored[id_], after[id_][0]) for id_ in pending], vectors)
        raise CocoaError(f"{store.name}: other processes keep changing {len(pending)} points; run again")


def existing_first(locations: Sequence[FileLocation]) -> Sequence[FileLocation]:
    """Return locations with the first that exists moved to the front; unchanged if none does."""
    if len(locations) == 1:
        return locations
    first = next((each for each in locations if not is_deleted(each.path)), locations[0])
    return [first, *(each for each in locations if each is not first)]
