"""One pass over image files on their way to a store: find, read, embed in batches, note what cannot be used.

What holds the points is a :class:`Store`; nothing here knows of Qdrant.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError, one_line, printable
from cocoa_embed.image_files import METADATA_FILE, find_images, read_image_folder_metadata
from cocoa_embed.images import decode_image, read_image_bytes
from cocoa_embed.integrations.points import Description, ImageRecord, Payload, payload, point_id, storable


class Point(NamedTuple):
    """What is stored of an image."""

    id: str
    vector: list[float]
    payload: Payload


class Store(Protocol):
    """A collection of points that can be written to."""

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, and wait until they are."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points, and wait until they are gone."""

    def describe(self, id_: str, description: Description) -> None:
        """Give a stored point the path of another file of the same content, or other words about it."""


class StoredPoint(NamedTuple):
    """What was in the store of a point before the run."""

    path: str
    words: Payload
    """Its ``caption`` and ``metadata``."""


@dataclass
class IndexRun:
    """One pass over files: what is waiting to be embedded, what was seen, and the counts."""

    store: Store
    encoder: Encoder
    batch_size: int
    stored: Mapping[str, StoredPoint]
    """Every point that was there before, by id."""
    indexed: int = 0
    updated: int = 0
    replaced: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    _waiting: dict[str, tuple[ImageRecord, Image.Image]] = field(default_factory=dict)
    _files: dict[str, list[Description]] = field(default_factory=dict)
    """The files of this run by the id of their content."""
    _stored_paths: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._stored_paths.update(point.path for point in self.stored.values())

    def add(self, file: Description) -> None:
        """Read a file and put its image in line, unless its content is a point already."""
        try:
            data = read_image_bytes(file.path)
            sha256 = hashlib.sha256(data).hexdigest()
            id_ = point_id(sha256)
            if id_ not in self.stored and id_ not in self._files:
                image, mime = decode_image(data, printable(file.path))
                self._waiting[id_] = (image_record(file, sha256, len(data), image, mime), image)
        except ImageError as error:
            self._fail(file, error.reason)
            return
        self._files.setdefault(id_, []).append(file)
        if len(self._waiting) == self.batch_size:
            self._flush()

    def finish(self) -> None:
        """Store what still waits; then bring the points up to date that were there before.

        A point whose file holds something else now, or is gone, is given another file of its content, or is removed if
        this run has seen none and the file's new content has taken its place. A point whose file is where it was is
        given the new words about it.
        """
        self._flush()
        current = {storable(str(file.path)): id_ for id_, files in self._files.items() for file in files}
        stale = {id_ for id_, point in self.stored.items() if current.get(point.path, id_) != id_}
        for id_ in self.stored:
            file = self._described_anew(id_, lost=id_ in stale)
            if file is not None:
                self.store.describe(id_, file)
                self.updated += 1
        if replaced := sorted(stale - self._files.keys()):
            self.store.delete(replaced)

    def _described_anew(self, id_: str, *, lost: bool) -> Description | None:
        """Return the file that a stored point is to be described by, or None if it is described well already."""
        stored, files = self.stored[id_], self._files.get(id_, [])
        if not files:
            return None
        here = [file for file in files if storable(str(file.path)) == stored.path]
        if here and not lost:
            return here[0] if here[0].has_words and as_json(here[0].words) != as_json(stored.words) else None
        return files[0] if lost or not os.path.exists(stored.path) else None

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        vectors = self._embed({id_: image for id_, (_, image) in waiting.items()})
        points = [Point(id_, vector.tolist(), payload(waiting[id_][0])) for id_, vector in vectors.items()]
        if not points:
            return
        self.store.upsert(points)
        replaced = sum(storable(str(waiting[id_][0].description.path)) in self._stored_paths for id_ in vectors)
        self.replaced += replaced
        self.indexed += len(points) - replaced

    def _embed(self, images: Mapping[str, Image.Image]) -> dict[str, np.ndarray]:
        """Return the vectors of images by id, and note the images that the model refuses."""
        if not images:
            return {}
        try:
            embeddings = self.encoder.embed_documents(
                [{"image": image} for image in images.values()], batch_size=self.batch_size
            )
        except (ValueError, RuntimeError) as error:
            if len(images) > 1:  # one image spoils a batch: find out which
                return {id_: vector for one in images.items() for id_, vector in self._embed(dict([one])).items()}
            self._fail_content(next(iter(images)), f"cannot be embedded ({one_line(error)})")
            return {}
        vectors = dict(zip(images, embeddings, strict=True))
        for id_ in [id_ for id_, vector in vectors.items() if not np.isfinite(vector).all()]:
            self._fail_content(id_, "has an embedding that is not finite")
            del vectors[id_]
        return vectors

    def _fail_content(self, id_: str, reason: str) -> None:
        for file in self._files.pop(id_):
            self._fail(file, reason)

    def _fail(self, file: Description, reason: str) -> None:
        self.failed.append({"path": str(file.path), "reason": reason})


def as_json(words: Payload) -> str:
    """Return words in a form in which 1 and true differ."""
    return json.dumps(words, sort_keys=True)


def find_image_files(paths: Iterable[str | Path]) -> list[Description]:
    """Return the images among and below ``paths``, each once, with what ``metadata.jsonl`` files say of them.

    :raises CocoaError: If a path does not exist, none holds an image, or a ``metadata.jsonl`` is malformed.
    """
    roots = [Path(os.path.abspath(path)) for path in paths]
    files: dict[Path, Description] = {}
    for root in roots:
        folder = root if root.is_dir() else root.parent
        images = [path for path in find_images([root]) if path not in files]
        rows = read_metadata_below(folder, images)
        for path in images:
            row = rows.get(path, {})
            caption = row.pop("text", None)
            files[path] = Description(path, str(path.relative_to(folder)), caption, row)
    if not files:
        names = ", ".join(printable(root) for root in roots) or "nothing"
        raise CocoaError(f"there are no images in {names}; name a folder that holds some (jpg, png, webp, ...)")
    return list(files.values())


def read_metadata_below(folder: Path, images: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Return the metadata columns of images by path, from the ``metadata.jsonl`` files in ``folder`` and below.

    Several lines for one image are one: their texts as lines of one text, of other columns the first.

    :raises CocoaError: If a ``metadata.jsonl`` is malformed.
    """
    folders = {parent for image in images for parent in image.parents if parent.is_relative_to(folder)}
    columns: dict[Path, dict[str, Any]] = {}
    for parent in sorted(folders):
        if not (parent / METADATA_FILE).exists():
            continue
        for row in read_image_folder_metadata(parent):
            path = Path(os.path.abspath(row["path"]))
            text = row.get("text")
            known = columns.setdefault(path, {})
            if isinstance(text, str):
                known["text"] = f"{known['text']}\n{text}" if "text" in known else text
            for name, value in row.items():
                if name not in ("path", "file_name", "text"):
                    known.setdefault(name, value)
    return columns


def image_record(file: Description, sha256: str, size: int, image: Image.Image, mime: str) -> ImageRecord:
    """Return what the payload holds of a decoded file."""
    return ImageRecord(
        description=file,
        sha256=sha256,
        bytes=size,
        width=image.width,
        height=image.height,
        mime=mime,
    )
