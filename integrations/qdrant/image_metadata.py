"""The image files of an indexing run, with the metadata of their folders and the folders above."""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cocoa_embed.errors import UsageError, printable
from cocoa_embed.images.find_files import LIST_SUFFIX, find_images, read_file_list, search_folder
from cocoa_embed.images.passed_over import PassedOver, is_searched
from cocoa_embed.integrations.qdrant.points import ImageFile, storable
from cocoa_embed.sources.image_metadata import ImageMetadata

logger = logging.getLogger(__name__)


class ImageFiles:
    """The image files of a run in order, each once, with the metadata of their folders.

    A folder or a metadata row that cannot be read is listed in ``unlisted``, as ``{"path", "reason"}``, and skipped. A
    missing file of a list is kept, for the run to report.
    """

    def __init__(self, paths: Iterable[str | Path], exclude: Sequence[str] = ()) -> None:
        """Find the images that ``paths`` name, as ``find_images`` does, and read the metadata.

        :param exclude: Patterns of files and folders to pass over (``PassedOver``).
        :raises CocoaError: If a path does not exist, or a pattern matches nothing.
        :raises UsageError: If a path is empty.
        """
        self.unlisted: list[dict[str, str]] = []
        self.passed_over = PassedOver(exclude)
        self.covered: list[str] = []
        """The folders and files that the run covers, as payloads name them."""
        self._roots: dict[Path, Path] = {}
        """The folder where the relative path of each file starts."""
        for path in outermost(paths):
            root = search_folder(path)
            for file in find_images([path], on_error=self._note, passed_over=self.passed_over):
                self._roots.setdefault(Path(os.path.abspath(file)), root)
            self.covered += [storable(os.path.abspath(place)) for place in places_covered(path)]
        for pattern in self.passed_over.unused:
            logger.warning("--exclude %s: nothing matches it", printable(pattern))
        metadata = ImageMetadata(self._note)
        self._files = [self._describe(root, file, metadata) for file, root in self._roots.items()]

    def _note(self, source: str | Path, reason: str) -> None:
        self.unlisted.append({"path": str(source), "reason": reason})

    def __len__(self) -> int:
        """Return how many files there are."""
        return len(self._roots)

    def __iter__(self) -> Iterator[ImageFile]:
        """Yield the files with their metadata."""
        return iter(self._files)

    def covers(self, path: str) -> bool:
        """Return whether the run would have found a file of this path, as a payload names it, if it existed."""
        return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in self.covered)

    def misses(self, path: str) -> bool:
        """Return whether a file no longer exists that the run would have found."""
        return self.covers(path) and is_deleted(path)

    def _describe(self, root: Path, file: Path, metadata: ImageMetadata) -> ImageFile:
        columns, source, checked_sources = metadata.describe(file, root)
        return ImageFile(
            file,
            str(file.relative_to(root)) if file.is_relative_to(root) else file.name,
            columns.pop("text", None),
            columns,
            caption_source=storable(source),
            checked_sources=frozenset(map(storable, checked_sources)),
        )


def outermost(paths: Iterable[str | Path]) -> list[Path]:
    """Return absolute paths, each once, without those that the search of a folder that is also named finds.

    :raises UsageError: If one is empty.
    """
    given = list(paths)
    if "" in given:
        raise UsageError("a path is empty; name a folder of images or an image file")
    named = list(dict.fromkeys(Path(os.path.abspath(path)) for path in given))
    folders = {path for path in named if path.is_dir()}
    return [
        path for path in named if not any(is_searched(folder, path) for folder in folders.intersection(path.parents))
    ]


def places_covered(path: Path) -> list[Path]:
    """Return the folders and files that a path stands for, whether they exist or not."""
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return list(read_file_list(path))
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
