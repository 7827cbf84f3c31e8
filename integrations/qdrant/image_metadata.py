"""The image files of an index run, with what the metadata files in their folders and above say about them."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocoa_embed.data.image_folder import METADATA_FILE, METADATA_FILES, DescribedImage, find_metadata, read_metadata
from cocoa_embed.errors import CocoaError, RowError, UsageError, printable
from cocoa_embed.images.find_files import LIST_SUFFIX, find_images, read_file_list, search_folder
from cocoa_embed.integrations.qdrant.points import ImageFile, storable

logger = logging.getLogger(__name__)


@dataclass
class ImageFiles:
    """Image files in the order of the run, each once.

    :param roots: Folders, each with the files found by it; a file's relative path starts there.
    :param covered: The folders and files that the run covers, as payloads name them.
    :param unlisted: Folders and metadata rows that cannot be read, as ``{"path", "reason"}``.
    """

    roots: list[tuple[Path, list[Path]]]
    covered: list[str]
    unlisted: list[dict[str, str]]
    _columns: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """What is said of each file."""
    _caption_source: dict[Path, str] = field(default_factory=dict)
    """The first metadata file that says something of each file."""
    _checked_sources: dict[Path, frozenset[str]] = field(default_factory=dict)
    """The metadata files, read without a fault, that may say something of the files in each folder."""

    def __post_init__(self) -> None:
        first = {(root, file.parent): file for root, files in self.roots for file in reversed(files)}
        above: dict[Path, set[Path]] = defaultdict(set)
        for root, folder in first:
            above[folder] |= {folder, *(up for up in folder.parents if up.is_relative_to(root))}
        read = {folder: self._read_metadata(folder) for folder in sorted(set().union(*above.values()))}
        self._checked_sources = {
            folder: frozenset(name for up in each if (name := read[up]) is not None) for folder, each in above.items()
        }
        if beside := next((text for file in first.values() if (text := file.with_suffix(".txt")).is_file()), None):
            logger.warning("%s: text files beside images are not read; write captions to %s, with the columns file_name"
                           " and text", printable(beside), METADATA_FILE)  # fmt: skip

    def __len__(self) -> int:
        """Return how many files there are."""
        return sum(len(files) for _, files in self.roots)

    def __iter__(self) -> Iterator[ImageFile]:
        """Yield the files with what is said of them."""
        for root, files in self.roots:
            yield from (self._describe(root, file) for file in files)

    def covers(self, path: str) -> bool:
        """Return whether the run would have found a file of this path, as a payload names it, if it existed."""
        return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in self.covered)

    def _describe(self, root: Path, file: Path) -> ImageFile:
        columns = dict(self._columns.get(file, {}))
        return ImageFile(
            file,
            str(file.relative_to(root)) if file.is_relative_to(root) else file.name,
            columns.pop("text", None),
            columns,
            caption_source=self._caption_source.get(file),
            checked_sources=self._checked_sources.get(file.parent, frozenset()),
        )

    def _read_metadata(self, folder: Path) -> str | None:
        """Read the metadata file of a folder, if it has one; return its name if every row could be used."""
        metadata = next((path for name in METADATA_FILES if (path := folder / name).exists()), None)
        if metadata is None:
            return None
        faults = len(self.unlisted)
        try:
            for row in read_metadata(find_metadata(folder)):
                if isinstance(row, RowError):
                    self.unlisted.append({"path": row.source, "reason": row.reason})
                else:
                    self._add(row, storable(str(metadata)))
        except CocoaError as error:
            self.unlisted.append({"path": str(metadata), "reason": str(error)})
        return storable(str(metadata)) if len(self.unlisted) == faults else None

    def _add(self, image: DescribedImage, metadata: str) -> None:
        """Add a row of metadata. Of several rows of an image, all texts count, as lines; of other columns the first."""
        path = Path(os.path.abspath(image.path))
        self._caption_source.setdefault(path, metadata)
        known = self._columns.setdefault(path, {})
        text = image.columns.get("text")
        if isinstance(text, str):
            known["text"] = f"{known['text']}\n{text}" if "text" in known else text
        # Parquet files have values that JSON does not have: dates become strings, NaN becomes null.
        columns = {name: value for name, value in image.columns.items() if name not in ("file_name", "text")}
        for name, value in json.loads(json.dumps(columns, default=str), parse_constant=lambda _: None).items():
            known.setdefault(name, value)


def find_image_files(paths: Iterable[str | Path]) -> ImageFiles:
    """Return the images that ``paths`` name, each once, with what metadata files say of them.

    A folder that cannot be listed is noted and skipped. A missing file of a list is kept, for the run to report.

    :param paths: As ``find_images`` takes them: folders, files, lists and patterns.
    :raises CocoaError: If a path does not exist, or a pattern matches nothing.
    :raises UsageError: If a path is empty.
    """
    roots: list[tuple[Path, list[Path]]] = []
    covered: list[str] = []
    unlisted: list[dict[str, str]] = []
    seen: set[Path] = set()

    def note(folder: Path, reason: str) -> None:
        unlisted.append({"path": str(folder), "reason": reason})

    for path in outermost(paths):
        found = (Path(os.path.abspath(file)) for file in find_images([path], on_error=note))
        new = [file for file in found if file not in seen]
        seen.update(new)
        roots.append((search_folder(path), new))
        covered += [storable(os.path.abspath(place)) for place in places_covered(path)]
    return ImageFiles(roots, covered, unlisted)


def outermost(paths: Iterable[str | Path]) -> list[Path]:
    """Return absolute paths, each once, without those inside a folder that is also named.

    :raises UsageError: If one is empty.
    """
    given = list(paths)
    if "" in given:
        raise UsageError("a path is empty; name a folder of images or an image file")
    named = list(dict.fromkeys(Path(os.path.abspath(path)) for path in given))
    folders = {path for path in named if path.is_dir()}
    return [path for path in named if folders.isdisjoint(path.parents)]


def places_covered(path: Path) -> list[Path]:
    """Return the folders and files that a path stands for, whether they exist or not."""
    if path.is_dir():
        return [path]
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return read_file_list(path)
    return [path] if os.path.lexists(path) else [search_folder(path)]
