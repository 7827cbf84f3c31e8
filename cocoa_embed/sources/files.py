"""Local image files as a source: folders, single files, patterns, lists of files."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.images.file_names import as_on_disk
from cocoa_embed.images.find_files import (
    FolderSearch,
    is_file_list,
    is_image_name,
    is_literal,
    read_file_list,
    search_folder,
)
from cocoa_embed.images.load import read_stable_file
from cocoa_embed.images.passed_over import PassedOver, is_searched
from cocoa_embed.sources.base import Record, Shard, is_below, relative_key, storable
from cocoa_embed.sources.image_metadata import ImageMetadata

NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""The errors of a path that certainly leads to no file: nothing is there, or a link to itself."""


@dataclass
class FileSource:
    """The image files that paths stand for: one folder, pattern or list, or any number of files (``find_images``)."""

    paths: Sequence[Path]
    """Absolute."""
    search: FolderSearch
    """Shared by the sources of a run, so that each folder is searched once."""
    metadata: ImageMetadata
    may_be_gone: bool
    """Whether a path that does not exist is a source without files."""

    @property
    def name(self) -> str:
        """The path; of several files, the folder that holds all."""
        return str(self.paths[0]) if len(self.paths) == 1 else os.path.commonpath([path.parent for path in self.paths])

    def shards(self) -> Iterator[Shard]:
        """Yield the files, including those that do not exist, some of a folder at a time.

        :raises CocoaError: As ``find_images``.
        """
        for path in self.paths:
            if self.may_be_gone and not os.path.lexists(path) and is_literal(path):
                continue
            root = search_folder(path)
            for files in chain(self.search.find(path), self.search.follow_links()):
                yield Shard(os.path.dirname(files[0]), partial(map, partial(self._record, root), files))

    def _record(self, root: Path, file: str) -> Record:
        path = Path(os.path.abspath(file))
        try:
            status = os.stat(path)
            mtime, size = status.st_mtime, status.st_size
        except (OSError, ValueError):  # reading it reports the reason
            mtime, size = 0.0, None
        metadata, source, checked = self.metadata.describe(path, root)
        key, read = str(path), partial(read_stable_file, path)
        return Record(key, relative_key(key, str(root)), read, mtime, size, None, metadata, source, checked)

    def covers(self, key: str) -> bool:
        """Return whether a file of this path, as payloads name it, would have been found, if it existed."""
        folder, files = self._covered
        return key in files or (folder is not None and is_below(key, folder))

    def is_deleted(self, key: str) -> bool:
        """Return whether there is certainly no file at a path."""
        return is_deleted(key)

    @cached_property
    def _covered(self) -> tuple[str | None, frozenset[str]]:
        """The folder and the files that the paths stand for, whether they exist or not."""
        if len(self.paths) > 1:
            return None, frozenset(storable(str(path)) for path in self.paths)
        (path,) = self.paths
        if is_file_list(path):
            return None, frozenset(storable(os.path.abspath(file)) for file in read_file_list(path))
        folder = path if is_literal(path) else search_folder(path)
        return storable(str(folder)), frozenset([storable(str(path))])


def file_sources(
    paths: Iterable[str | Path],
    on_error: Callable[[str | Path, str], object],
    passed_over: PassedOver | None = None,
    *,
    may_be_gone: bool = False,
) -> list[FileSource]:
    """Return the sources of local paths, each once; paths inside one of the folders are left to its search.

    :param on_error: Called with a folder or a row of metadata that cannot be used, and the reason.
    :param passed_over: Decides what is passed over, and counts it.
    :param may_be_gone: Whether a path that does not exist is a source without files.
    """
    named = list(dict.fromkeys(as_on_disk(Path(os.path.abspath(path))) for path in paths))
    folders = {path for path in named if os.path.isdir(path)}
    outermost = [
        path for path in named if not any(is_searched(folder, path) for folder in folders.intersection(path.parents))
    ]
    search, metadata = FolderSearch(on_error, outermost, passed_over), ImageMetadata(on_error)
    files = [path for path in outermost if path not in folders and is_image_file(path)]
    single = set(files)
    groups = [*([path] for path in outermost if path not in single), *([files] if files else [])]
    return [FileSource(group, search, metadata, may_be_gone) for group in groups]


def is_image_file(path: Path) -> bool:
    """Return whether a path is a file, but not a list; a missing file counts if its name is that of an image."""
    is_file = os.path.isfile(path) and not is_file_list(path)
    return is_file or (is_image_name(path.name) and is_literal(path))


def require_images(paths: Sequence[str | Path], exclude: Sequence[str] = ()) -> None:
    """Check that there are images in local paths, or a folder that cannot be listed, which the run reports.

    :param exclude: Patterns of files and folders that do not count.
    :raises CocoaError: If there are none, or as ``find_images``.
    """
    faults: list[str | Path] = []
    passed_over = PassedOver(exclude)
    sources = file_sources(paths, lambda path, _: faults.append(path), passed_over)
    if not any(True for source in sources for _ in source.shards()) and not faults:
        names = ", ".join(map(printable, paths)) or "nothing"
        skipped = passed_over.counts.total()
        but = f" except for {skipped} passed over" if skipped else ""
        raise CocoaError(f"there are no images in {names}{but}; name a folder that holds some (jpg, png, webp, ...)")


def undecode(key: str) -> str:
    r"""Return a payload's path with its undecodable bytes, which the payload stores as ``\udcNN``."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), key)


def files_of(key: str) -> list[str]:
    """Return the files that may hold the image of a key, one for each ``#``: both names may contain it."""
    return [key[: sign.start()] for sign in re.finditer("#", key)]


def is_deleted(key: str) -> bool:
    r"""Return whether there is certainly no file at a path, or no file that holds a shard's image.

    A path that cannot be checked, for lack of permission or of a network, does not count as deleted, nor does a URL.

    :param key: The key as in a payload: with ``\udcNN`` for undecodable bytes.
    """
    if "://" in key:
        return False
    undecoded = undecode(key)
    # A file may have the characters \udcNN in its name.
    for spelling in dict.fromkeys((key, undecoded, *files_of(undecoded))):
        try:
            if stat.S_ISREG(os.stat(spelling).st_mode):
                return False
        except OSError as error:
            if error.errno not in NO_FILE:
                return False
        except ValueError:
            return False
    return True
