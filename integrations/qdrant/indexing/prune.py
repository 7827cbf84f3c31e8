"""Remove images from a collection: those that no longer exist, and those that a user names."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

from cocoa_embed.integrations.qdrant.indexing.merge import BATCH_CHANGES, Change, Merger
from cocoa_embed.integrations.qdrant.points import HELD_KEYS, is_in_shard, own_locations, shards_of
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import Source, is_below, storable
from cocoa_embed.sources.open import local_path

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexing.manifest import Manifest
    from cocoa_embed.integrations.qdrant.indexing.writer import Writer

MAX_PRUNED = 0.3
"""The fraction of a source's points that a run may prune unless it should prune all; one point may always go."""

NO_FILES = frozenset({"lost+found"})
"""The entries of a file system without files."""


@dataclass
class Pruning:
    """The images of a collection that no longer exist, and how many points each source would lose."""

    sources: Sequence[Source]
    totals: Counter[int] = field(default_factory=Counter)
    """Points with an image that a source covers, by the number of the source."""
    going: Counter[int] = field(default_factory=Counter)
    """Of these, the points that would have no image left."""
    paths: Counter[int] = field(default_factory=Counter)
    """The images that no longer exist."""
    doubtful: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The images below each folder that may be the mount point of a missing disk, and why it may be."""

    def __post_init__(self) -> None:
        self._doubtful_folder = lru_cache(maxsize=1024)(doubtful_folder)

    def find(self, store: Store, *, even_doubtful: bool) -> Iterator[tuple[str, str, list[int]]]:
        """Yield the id and the path of each image that no longer exists, and the sources that cover it."""
        for id_, payload in store.scan(HELD_KEYS):
            paths = [each.path for each in own_locations(id_, payload)]
            covering = {path: self._covering(path, shards_of(payload)) for path in paths}
            self.totals.update({i for numbers in covering.values() for i in numbers})
            deleted = []
            for path, numbers in covering.items():
                if any(self.sources[i].is_deleted(path) for i in numbers):
                    root = self.sources[numbers[0]].name
                    doubtful = None if even_doubtful else self._doubtful_folder(os.path.dirname(path), root)
                    if doubtful is None:
                        deleted.append(path)
                    else:
                        self.doubtful[doubtful] += 1
            self.going.update({i for path in deleted for i in covering[path]} if len(deleted) == len(paths) else ())
            for path in deleted:
                self.paths.update(covering[path])
                yield id_, path, covering[path]

    def _covering(self, path: str, shards: Sequence[str]) -> list[int]:
        """Return the sources of an image: those that cover it, and the shard that holds it, which may be gone."""
        held = {shard for shard in shards if is_in_shard(path, shard)}
        return [i for i, each in enumerate(self.sources) if each.covers(path) or storable(each.name) in held]

    def refusals(self, found: Counter[int]) -> dict[int, str]:
        """Return the sources that must not be pruned, each with the reason.

        :param found: The number of images that each source has now.
        """
        refused = {}
        for i, source in enumerate(self.sources):
            lost = f"{self.going[i]} of its {self.totals[i]} points would be pruned"
            if self.paths[i] and not found[i] and (self.going[i] or os.path.lexists(source.name)):
                refused[i] = f"has no images, and {lost}; is a disk missing? To prune them, use --prune-all"
            elif self.going[i] > max(1, MAX_PRUNED * self.totals[i]):
                refused[i] = f"{lost}; is a disk missing? To prune them, use --prune-all"
        return refused


def prune_deleted(
    store: Store, sources: Sequence[Source], found: Counter[int], writer: Writer, even_most: bool
) -> tuple[int, list[dict[str, str]]]:
    """Detach the images that no longer exist from their points, unless a source or a folder seems not to be mounted.

    :param found: The number of images that each source has now, by its number.
    :param even_most: Whether to detach them even then.
    :returns: The number of images, and the sources and folders that were not pruned, as ``{"path", "reason"}``.
    """
    pruning = Pruning(sources)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as deleted:
        for row in pruning.find(store, even_doubtful=even_most):
            deleted.write(json.dumps(row) + "\n")
        refused = {} if even_most else pruning.refusals(found)
        deleted.seek(0)
        pruned = 0
        for id_, path, numbers in map(json.loads, deleted):
            if refused.keys().isdisjoint(numbers):
                writer.detach(id_, path)
                pruned += 1
    kept = [{"path": sources[i].name, "reason": reason} for i, reason in refused.items()]
    unknown = [i for i, _ in enumerate(sources) if not found[i] and not pruning.totals[i]]
    gone = [sources[i].name for i in unknown if not os.path.lexists(sources[i].name)]
    kept += [{"path": name, "reason": "does not exist, and the index has nothing below it"} for name in gone]
    for (folder, why), count in sorted(pruning.doubtful.items()):
        reason = f"{why}, and {count} images below it would be pruned; is a disk missing? To prune, use --prune-all"
        kept.append({"path": folder, "reason": reason})
    return pruned, kept


def doubtful_folder(folder: str, root: str) -> tuple[str, str] | None:
    """Return the deepest folder above a missing file that exists, and why a disk may be missing there; None if not.

    :param root: The folder that is searched; those above are not checked.
    """
    while folder == root or is_below(folder, root):
        if os.path.lexists(folder):
            try:
                return (folder, "is empty") if NO_FILES.issuperset(os.listdir(folder)) else None
            except OSError as error:
                is_link = os.path.islink(folder) and not os.path.exists(folder)
                return folder, "is a link that leads nowhere" if is_link else f"cannot be listed ({error.strerror})"
        folder = os.path.dirname(folder)
    return None


class Forgotten(NamedTuple):
    """What was removed on request."""

    images: dict[str, int]
    """How many images, by the path that was given."""
    deleted: int
    """Points that had no image left."""


def forget(store: Store, manifest: Manifest, paths: Sequence[str | Path]) -> Forgotten:
    """Remove files, folders, shards and URLs from a collection, whether they exist or not.

    :param manifest: The manifest of the collection; shards that lose an image are read again by the next run.
    """
    images = Counter(dict.fromkeys(map(str, paths), 0))
    names: dict[str, list[str]] = {}
    for name in images:
        names.setdefault(storable(absolute(name)).rstrip("/"), []).append(name)
    names = as_stored(store, names)
    merger, deleted, reopened = Merger(), 0, set[str]()
    points = iter(store.scan(HELD_KEYS))
    while page := list(islice(points, BATCH_CHANGES)):
        changes: dict[str, Change] = {}
        for id_, payload in page:
            held = {each.path for each in own_locations(id_, payload)}
            named = {path: names.keys() & keys_of(path, shards_of(payload)) for path in held}
            images.update(name for keys in named.values() for key in keys for name in names[key])
            if removed := {path for path, keys in named.items() if keys}:
                changes[id_] = Change(removed=removed)
                deleted += removed == held
                for shard in set(shards_of(payload)) - reopened:
                    if any(is_in_shard(path, shard) for path in removed):
                        manifest.reopen(shard)
                        reopened.add(shard)
        merger.merge(store, changes)
    return Forgotten(dict(images), deleted)


def as_stored(store: Store, names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return names by the keys of a collection that they stand for.

    A key that the collection lacks stands for the one that differs from it only in how accents are composed; for
    itself if there is none, or several.
    """
    if "".join(names).isascii():
        return names
    composed: dict[str, set[str]] = {normalize("NFC", key): set() for key in names}
    for id_, payload in store.scan(HELD_KEYS):
        for each in own_locations(id_, payload):
            for key in keys_of(each.path, shards_of(payload)):
                if (form := normalize("NFC", key)) in composed:
                    composed[form].add(key)
    found: dict[str, list[str]] = {}
    for key, given in names.items():
        stored = composed[normalize("NFC", key)]
        (spelled,) = stored if len(stored) == 1 else {key}
        found.setdefault(spelled, []).extend(given)
    return found


def absolute(path: str) -> str:
    """Return a path as in the keys of records: absolute. An address stays as it is, unless it is of a local file."""
    local = local_path(path)
    return local if "://" in local else os.path.abspath(local)


def keys_of(path: str, shards: Sequence[str]) -> set[str]:
    """Return all names of an image: its path, the folders and URLs above it, and those of ``shards`` that hold it."""
    above = (path[: slash.start()] for slash in re.finditer("/", path))
    return {path, *above, *(shard for shard in shards if is_in_shard(path, shard))}
