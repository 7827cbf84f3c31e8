"""The image files of an indexing run, with the metadata of their folders and the folders above."""

import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cocoa_embed.data.image_folder import METADATA_FILE, METADATA_FILES, DescribedImage, find_metadata, read_metadata
from cocoa_embed.errors import CocoaError, RowError, UsageError, printable
from cocoa_embed.images.find_files import LIST_SUFFIX, find_images, read_file_list, search_folder
from cocoa_embed.integrations.qdrant.points import ImageFile, storable

logger = logging.getLogger(__name__)


class ImageFiles:
    """The image files of a run in order, each once, with the metadata of their folders.

    A folder or a metadata row that cannot be read is listed in ``unlisted``, as ``{"path", "reason"}``, and skipped. A
    missing file of a list is kept, for the run to report.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        """Find the images that ``paths`` name, as ``find_images`` does, and read the metadata.

        :raises CocoaError: If a path does not exist, or a pattern matches nothing.
        :raises UsageError: If a path is empty.
        """
        self.unlisted: list[dict[str, str]] = []
        self.covered: list[str] = []
        """The folders and files that the run covers, as payloads name them."""
        self._roots: dict[Path, Path] = {}
        """The folder where the relative path of each file starts."""
        self._columns: dict[Path, dict[str, Any]] = {}
        """The metadata of each file."""
        self._caption_source: dict[Path, str] = {}
        """The first metadata file that describes each file."""
        for path in outermost(paths):
            root = search_folder(path)
            for file in find_images([path], on_error=self._note):
                self._roots.setdefault(Path(os.path.abspath(file)), root)
            self.covered += [storable(os.path.abspath(place)) for place in places_covered(path)]
        self._checked_sources = self._read_all_metadata()
        """The metadata files, read without a fault, that may describe the files in each folder."""

    def _note(self, source: str | Path, reason: str) -> None:
        self.unlisted.append({"path": str(source), "reason": reason})

    def _read_all_metadata(self) -> dict[Path, frozenset[str]]:
        """Read the metadata files of all folders and the folders above; return the names of the good ones by folder."""
        folders = {(file.parent, root) for file, root in self._roots.items()}
        above = {(folder, *(up for up in folder.parents if up.is_relative_to(root))) for folder, root in folders}
        read = {folder: self._read_metadata(folder) for folder in sorted(set().union(*above))}
        if beside := next((text for file in self._roots if (text := file.with_suffix(".txt")).is_file()), None):
            logger.warning("%s: text files beside images are not read; write captions to %s, with the columns file_name"
                           " and text", printable(beside), METADATA_FILE)  # fmt: skip
        return {folder: frozenset(filter(None, map(read.get, (folder, *folder.parents)))) for folder, _ in folders}

    def __len__(self) -> int:
        """Return how many files there are."""
        return len(self._roots)

    def __iter__(self) -> Iterator[ImageFile]:
        """Yield the files with their metadata."""
        return (self._describe(root, file) for file, root in self._roots.items())

    def covers(self, path: str) -> bool:
        """Return whether the run would have found a file of this path, as a payload names it, if it existed."""
        return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in self.covered)

    def misses(self, path: str) -> bool:
        """Return whether a file no longer exists that the run would have found."""
        return self.covers(path) and is_deleted(path)

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
        name, faults = storable(str(metadata)), len(self.unlisted)
        try:
            for row in read_metadata(find_metadata(folder)):
                if isinstance(row, RowError):
                    self._note(row.source, row.reason)
                else:
                    self._add(row, name)
        except CocoaError as error:
            self._note(metadata, str(error))
        return name if len(self.unlisted) == faults else None

    def _add(self, image: DescribedImage, metadata: str) -> None:
        """Add a row of metadata. Of several rows of an image, all texts count, as lines; of other columns the first."""
        path = Path(os.path.abspath(image.path))
        self._caption_source.setdefault(path, metadata)
        known = self._columns.setdefault(path, {})
        text = image.columns.get("text")
        if isinstance(text, str):
            known["text"] = f"{known['text']}\n{text}" if "text" in known else text
        # Tables have values that JSON does not have: dates become strings, numbers that are not finite become null.
        columns = {name: value for name, value in image.columns.items() if name not in ("file_name", "text")}
        for name, value in json.loads(json.dumps(columns, default=str), parse_constant=lambda _: None).items():
            known.setdefault(name, value)


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
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return read_file_list(path)
    return [path] if os.path.lexists(path) else [search_folder(path)]


def is_deleted(path: str) -> bool:
    r"""Return whether there is certainly no file at a path.

    A path that cannot be checked, for lack of permission or of a network, is not deleted.

    :param path: As a payload has it: with ``\udcNN`` for undecodable bytes.
    """
    undecoded = re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), path)
    for spelling in {path, undecoded}:  # a file may have these characters in its name
        try:
            if stat.S_ISREG(os.stat(spelling).st_mode):
                return False
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
    return True
