"""The image files that a run is about: found, in order, and described by the ``metadata.jsonl`` files above them."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.find_files import (
    LIST_SUFFIX,
    METADATA_FILE,
    MetadataError,
    find_images,
    read_file_list,
    read_image_folder_metadata,
    search_folder,
)
from cocoa_embed.integrations.qdrant.points import ImageFile, storable


@dataclass
class ImageFiles:
    """Image files in the order in which a run takes them, each once."""

    roots: list[tuple[Path, list[Path]]]
    """Folders, and the files found by each; paths are relative to these folders."""
    covered: list[str]
    """What the run is about: folders and files, as payloads would name them."""
    unlisted: list[dict[str, str]]
    """What could not be read besides images, as ``{"path", "reason"}``: folders, and lines of ``metadata.jsonl``."""
    _columns: dict[Path, dict[str, Any]] = field(default_factory=dict)
    _caption_sources: dict[Path, str] = field(default_factory=dict)
    """The ``metadata.jsonl`` that says something of a file."""
    _sources: dict[Path, frozenset[str]] = field(default_factory=dict)
    """The ``metadata.jsonl`` files that might say something of the files of a folder."""

    def __post_init__(self) -> None:
        whole = {}
        for folder in sorted({folder for root, files in self.roots for folder in self._find_sources(root, files)}):
            whole[folder] = self._read_metadata(folder)
        broken = {storable(str(folder / METADATA_FILE)) for folder, is_whole in whole.items() if not is_whole}
        self._sources = {folder: sources - broken for folder, sources in self._sources.items()}

    def __len__(self) -> int:
        """Return how many files there are."""
        return sum(len(files) for _, files in self.roots)

    def __iter__(self) -> Iterator[ImageFile]:
        """Yield the files with what is said of them."""
        for root, files in self.roots:
            yield from (self._describe(root, file) for file in files)

    def covers(self, path: str) -> bool:
        """Tell whether a file of this path, as a payload names it, would have been found were it there."""
        return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in self.covered)

    def _describe(self, root: Path, file: Path) -> ImageFile:
        columns = dict(self._columns.get(file, {}))
        return ImageFile(
            file,
            str(file.relative_to(root)) if file.is_relative_to(root) else file.name,
            columns.pop("text", None),
            columns,
            caption_source=self._caption_sources.get(file),
            checked_sources=self._sources.get(file.parent, frozenset()),
        )

    def _find_sources(self, root: Path, files: Iterable[Path]) -> set[Path]:
        """Note and return the folders of the ``metadata.jsonl`` files that may speak of files.

        They lie beside a file, or in a folder above it up to ``root``.
        """
        found: set[Path] = set()
        for folder in {file.parent for file in files}:
            above = [folder, *(up for up in folder.parents if up.is_relative_to(root))]
            holding = {up for up in above if (up / METADATA_FILE).exists()}
            self._sources[folder] = frozenset(storable(str(up / METADATA_FILE)) for up in holding)
            found |= holding
        return found

    def _read_metadata(self, folder: Path) -> bool:
        """Read the ``metadata.jsonl`` of a folder, and tell whether every line could be used.

        Several lines for one image are one: their texts as lines of one text, of other columns the first.
        """
        problems = len(self.unlisted)
        try:
            rows = read_image_folder_metadata(folder, on_error=self._note_line)
        except CocoaError as error:
            self.unlisted.append({"path": str(folder / METADATA_FILE), "reason": str(error)})
            return False
        for row in rows:
            path = Path(os.path.abspath(row["path"]))
            self._caption_sources.setdefault(path, storable(str(folder / METADATA_FILE)))
            known = self._columns.setdefault(path, {})
            text = row.get("text")
            if isinstance(text, str):
                known["text"] = f"{known['text']}\n{text}" if "text" in known else text
            for name in row.keys() - {"path", "file_name", "text"}:
                known.setdefault(name, row[name])
        return len(self.unlisted) == problems

    def _note_line(self, error: MetadataError) -> None:
        self.unlisted.append({"path": error.source, "reason": error.reason})


def find_image_files(paths: Iterable[str | Path]) -> ImageFiles:
    """Return the images that ``paths`` name, each once, with what ``metadata.jsonl`` files say of them.

    A folder that cannot be listed is noted, and the others are done. A file of a list that is missing is kept, for the
    run to report.

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
    """Return absolute paths, each once, without those inside of a folder that is named too.

    :raises UsageError: If one is empty.
    """
    given = list(paths)
    if "" in given:
        raise UsageError("a path is empty; name a folder of images or an image file")
    named = list(dict.fromkeys(Path(os.path.abspath(path)) for path in given))
    folders = {path for path in named if path.is_dir()}
    return [path for path in named if folders.isdisjoint(path.parents)]


def places_covered(path: Path) -> list[Path]:
    """Return the folders and files that a path stands for, whether they are there or not."""
    if path.is_dir():
        return [path]
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return read_file_list(path)
    return [path] if os.path.lexists(path) else [search_folder(path)]
