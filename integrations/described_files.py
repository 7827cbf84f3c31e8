"""The image files that a run is about: found, in order, and described by the ``metadata.jsonl`` files above them."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocoa_embed.image_files import (
    LIST_SUFFIX,
    METADATA_FILE,
    find_images,
    read_file_list,
    read_image_folder_metadata,
    search_folder,
)
from cocoa_embed.integrations.points import Description, storable


@dataclass
class ImageFiles:
    """Image files in the order in which a run takes them, each once."""

    roots: list[tuple[Path, list[Path]]]
    """Folders, and the files found by each; paths are relative to these folders."""
    covered: list[str]
    """What the run is about: folders and files, as payloads would name them."""
    unlisted: list[dict[str, str]]
    """Folders that could not be listed, as ``{"path", "reason"}``."""
    _columns: dict[Path, dict[str, Any]] = field(default_factory=dict)
    _folders_with_words: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        speaking = {folder for root, files in self.roots for folder in self._note_speaking(root, files)}
        for folder in sorted(speaking):
            self._read_metadata(folder)

    def __len__(self) -> int:
        """Return how many files there are."""
        return sum(len(files) for _, files in self.roots)

    def __iter__(self) -> Iterator[Description]:
        """Yield the files with what is said of them."""
        for root, files in self.roots:
            yield from (self._describe(root, file) for file in files)

    def covers(self, path: str) -> bool:
        """Tell whether a file of this path, as a payload names it, would have been found were it there."""
        return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in self.covered)

    def _describe(self, root: Path, file: Path) -> Description:
        columns = dict(self._columns.get(file, {}))
        return Description(
            file,
            str(file.relative_to(root)) if file.is_relative_to(root) else file.name,
            columns.pop("text", None),
            columns,
            has_words=file.parent in self._folders_with_words,
        )

    def _note_speaking(self, root: Path, files: Iterable[Path]) -> set[Path]:
        """Note the folders of files that a ``metadata.jsonl`` speaks of, and return those that hold one.

        It may lie beside a file, or in a folder above it up to ``root``.
        """
        speaking: set[Path] = set()
        for folder in {file.parent for file in files}:
            above = [folder, *(up for up in folder.parents if up.is_relative_to(root))]
            holding = {up for up in above if (up / METADATA_FILE).exists()}
            speaking |= holding
            if holding:
                self._folders_with_words.add(folder)
        return speaking

    def _read_metadata(self, folder: Path) -> None:
        """Read the ``metadata.jsonl`` of a folder.

        Several lines for one image are one: their texts as lines of one text, of other columns the first.

        :raises CocoaError: If it is malformed.
        """
        for row in read_image_folder_metadata(folder):
            known = self._columns.setdefault(Path(os.path.abspath(row["path"])), {})
            text = row.get("text")
            if isinstance(text, str):
                known["text"] = f"{known['text']}\n{text}" if "text" in known else text
            for name in row.keys() - {"path", "file_name", "text"}:
                known.setdefault(name, row[name])


def find_image_files(paths: Iterable[str | Path]) -> ImageFiles:
    """Return the images that ``paths`` name, each once, with what ``metadata.jsonl`` files say of them.

    A folder that cannot be listed is noted, and the others are done. A file of a list that is missing is kept, for the
    run to report.

    :param paths: As :func:`~cocoa_embed.image_files.find_images` takes them: folders, files, lists and patterns.
    :raises CocoaError: If a path does not exist, a pattern matches nothing, or a ``metadata.jsonl`` is malformed.
    """
    roots: list[tuple[Path, list[Path]]] = []
    covered: list[str] = []
    unlisted: list[dict[str, str]] = []
    seen: set[Path] = set()

    def note(folder: Path, reason: str) -> None:
        unlisted.append({"path": str(folder), "reason": reason})

    for path in (Path(os.path.abspath(path)) for path in paths):
        found = (Path(os.path.abspath(file)) for file in find_images([path], on_error=note))
        new = [file for file in found if file not in seen]
        seen.update(new)
        roots.append((search_folder(path), new))
        covered += [storable(os.path.abspath(place)) for place in places_covered(path)]
    return ImageFiles(roots, covered, unlisted)


def places_covered(path: Path) -> list[Path]:
    """Return the folders and files that a path stands for, whether they are there or not."""
    if path.is_dir():
        return [path]
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return read_file_list(path)
    return [path] if os.path.lexists(path) else [search_folder(path)]
