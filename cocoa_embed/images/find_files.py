"""Find image files: in folders, by patterns, in lists."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.images.file_names import as_on_disk
from cocoa_embed.images.passed_over import PassedOver

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .hif"
    " .jp2 .j2k .jpx .jpc .ppm .pgm .pbm .pnm .tga .ico .icns .psd".split()
)
"""The suffixes of image files in a folder, in lower case."""

LIST_SUFFIX = ".txt"
"""The suffix of a file that lists other files, one per line."""

OnError: TypeAlias = Callable[[Path, str], object]
"""Called with a folder that cannot be listed, and the reason."""

BATCH_FILES = 1024
"""Files of a list or a pattern that are yielded together."""

WILDCARD = re.compile(r"[*?[]")


def find_images(
    paths: Iterable[str | Path], *, on_error: OnError | None = None, passed_over: PassedOver | None = None
) -> list[Path]:
    """Return the image files that ``paths`` name, sorted, each once. Broken images are included.

    - A file is taken, with any suffix. A ``.txt`` file is a list (``read_file_list``): the files that it lists are
      taken, whether they exist or not; folders in it are not searched.
    - A folder is searched, with its subfolders, for files with an image's suffix (``IMAGE_SUFFIXES``, in either case).
      Links to folders are followed, each folder once; a file that is reached both ways keeps the path without a link.
    - A path that does not exist is a pattern if it has ``*``, ``?`` or ``[``: as in a shell, with ``**`` for folders of
      any depth. Folders that match are searched; files that match are taken if they have an image's suffix or the
      pattern's.
    - Companions of other files (``._a.jpg``) are passed over, and so are system folders (``is_system_folder``), folders
      that are marked as caches, and what is excluded; a folder in ``paths`` itself is always searched.

    :param on_error: Called for each folder that cannot be listed; the search then skips it.
    :param passed_over: Excludes further files and folders, relative to ``search_folder`` of a path, and counts what is
        passed over.
    :raises CocoaError: If a path does not exist, a pattern matches nothing, a list cannot be read or, without
        ``on_error``, a folder cannot be listed.
    """
    search = FolderSearch(on_error, passed_over=passed_over)
    found = {file for path in paths for files in search.find(Path(path)) for file in files}
    found.update(file for files in search.follow_links() for file in files)
    # NUL sorts before everything, so that a folder's files are neighbours, as when paths are compared.
    return [Path(path) for path in sorted(found, key=lambda path: path.replace(os.sep, "\0"))]


def is_image_name(name: str) -> bool:
    """Return whether the name of a file has an image's suffix (``IMAGE_SUFFIXES``), in upper or lower case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_file_list(path: Path) -> bool:
    """Return whether a path is a list of files."""
    return path.suffix.lower() == LIST_SUFFIX and os.path.isfile(path)


def search_folder(path: str | Path) -> Path:
    """Return the folder to which the paths of images found by ``path`` are relative.

    It is the folder itself, the folder of a file or of a list, or the part of a pattern before its first wildcard.
    """
    folder, _ = split_pattern(Path(path))
    return folder if os.path.isdir(folder) else folder.parent


def read_file_list(path: str | Path) -> Iterator[Path]:
    """Read a list of files: one path per line, relative to the list's folder.

    If names have newlines, each path ends in NUL instead. Empty lines and lines that begin with ``#`` are skipped. The
    files need not exist.

    :raises CocoaError: If the list cannot be read, or is UTF-16.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CocoaError(f"{printable(path)} cannot be read ({error.strerror})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CocoaError(f"{printable(path)} is UTF-16; save the list of files as UTF-8")
    if b"\0" in data:
        names: Iterable[bytes] = data.split(b"\0")
    else:
        lines = (line.rstrip(b"\r\n") for line in BytesIO(data.removeprefix(b"\xef\xbb\xbf")))
        names = (line for line in lines if line.strip() and not line.startswith(b"#"))
    folder = Path(path).parent
    return (as_on_disk(folder / os.fsdecode(name)) for name in names if name)


def is_literal(path: Path) -> bool:
    """Return whether a path, which need not exist, has no wildcard."""
    return not split_pattern(path)[1]


def split_pattern(pattern: Path) -> tuple[Path, tuple[str, ...]]:
    """Split a pattern into the folder that it begins with and its parts from the first wildcard on.

    A part that names an existing file or folder, such as ``photos[1]``, is not a wildcard.
    """
    folder = Path()
    for number, part in enumerate(pattern.parts):
        if WILDCARD.search(part) and not os.path.lexists(folder / part):
            return folder, pattern.parts[number:]
        folder = folder / part
    return folder, ()


def match_pattern(pattern: Path) -> list[Path]:
    """Return the files and folders that match a ``glob`` pattern, after ``split_pattern``, sorted."""
    folder, parts = split_pattern(pattern)
    return sorted(map(Path, glob.glob(os.path.join(glob.escape(str(folder)), *parts), recursive=True)))


class FolderSearch:
    """Finds image files folder by folder, each folder once."""

    def __init__(
        self, on_error: OnError | None, roots: Iterable[Path] = (), passed_over: PassedOver | None = None
    ) -> None:
        """Prepare a search.

        :param roots: Folders that are searched under their own names: a link that leads to one is not followed.
        """
        self._on_error = on_error
        self._passed_over = PassedOver() if passed_over is None else passed_over
        self._root = ""
        """The folder that excluded paths are relative to."""
        self._roots = {self._identity(str(root)) for root in roots if os.path.isdir(root)}
        self._listed: set[tuple[int, int]] = set()
        self._links: list[tuple[str, str]] = []
        self._refused: set[str] = set()

    def find(self, path: Path) -> Iterator[list[str]]:
        """Yield the files that a path names, some at a time (``find_images``); links to folders are kept for later.

        :raises CocoaError: As ``find_images``.
        """
        path = as_on_disk(path)
        self._root = str(search_folder(path))
        if os.path.isdir(path):
            yield from self._search(str(path))
        elif is_file_list(path):
            yield from self._batches(map(str, read_file_list(path)))
        elif os.path.lexists(path):
            yield from self._batches([str(path)])
        else:
            yield from self._match(path)

    def follow_links(self) -> Iterator[list[str]]:
        """Yield the images in folders that only links lead to."""
        for link in self._linked():
            yield from self._search(link)

    def walk(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Yield a folder and those below it, also behind links, each with the names of all files that are in it."""
        self._root = folder
        for root in chain([folder], self._linked()):
            yield from self._walk(root)

    def _linked(self) -> Iterator[str]:
        while self._links:
            links, self._links = sorted(self._links), []
            for self._root, link in links:
                yield link

    def _search(self, root: str) -> Iterator[list[str]]:
        """Yield the images in a folder and its subfolders, folder by folder."""
        for path, files in self._walk(root):
            images = sorted(filter(is_image_name, files))
            found = [os.path.join(path, name).removeprefix("./") for name in images]
            if found := [file for file in found if not self._passed_over.has_file(file, self._root)]:
                yield found

    def _walk(self, root: str) -> Iterator[tuple[str, list[str]]]:
        """Yield a folder and its subfolders with the names of their files; links to folders are kept for later."""
        for path, folders, files in os.walk(root, onerror=self._refuse):
            identity = self._identity(path)
            is_other_root = identity in self._roots and path != root
            is_cache = self._passed_over.has_cache(path, files, is_named=path == self._root)
            if identity in self._listed or is_other_root or is_cache:
                folders.clear()
                continue
            self._listed.add(identity)
            folders[:] = sorted(name for name in folders if not self._passed_over.has_folder(path, name, self._root))
            links = filter(os.path.islink, (os.path.join(path, name) for name in folders))
            self._links += ((self._root, link) for link in links)
            yield path, files

    def _match(self, pattern: Path) -> Iterator[list[str]]:
        """Yield what matches a pattern: folders are searched, files need an image's suffix or the pattern's.

        :raises CocoaError: If nothing matches.
        """
        folder, parts = split_pattern(pattern)
        if not parts:
            raise CocoaError(f"{printable(pattern)} does not exist; name a folder of images or an image file")
        matches = iter(self._matching(str(folder), parts, set()) if os.path.isdir(folder) else ())
        first = next(matches, None)
        if first is None:
            raise CocoaError(f"{printable(pattern)} does not exist, and nothing matches it as a pattern")
        suffixes = {*IMAGE_SUFFIXES, os.path.splitext(parts[-1])[1].lower()}
        folders: list[str] = []

        def matching_files() -> Iterator[str]:
            for match in chain([first], matches):
                if os.path.isdir(match):
                    folders.append(match)
                elif os.path.splitext(match)[1].lower() in suffixes:
                    yield match.removeprefix("./")

        yield from self._batches(matching_files())
        for match in folders:
            yield from self._search(match)

    def _matching(self, folder: str, parts: tuple[str, ...], seen: set[tuple[int, int, int]]) -> Iterator[str]:
        """Yield the matches of a pattern's parts in a folder; ``seen`` ends loops of links."""
        key = (*self._identity(folder), len(parts))
        if key in seen:
            return
        seen.add(key)
        part, rest = parts[0], parts[1:]
        if part == "**" and not rest:
            yield folder
        elif part == "**":
            yield from self._matching(folder, rest, seen)
        is_match = re.compile("" if part == "**" else translate(part)).match
        for entry in sorted(self._entries(folder), key=lambda entry: entry.name):
            is_hidden = entry.name.startswith(".") and not part.startswith(".")
            if is_hidden or not is_match(entry.name):
                continue
            if part != entry.name and entry.is_dir() and self._passed_over.has_folder(folder, entry.name, self._root):
                continue
            below = parts if part == "**" else rest
            if below and os.path.isdir(entry.path):
                yield from self._matching(entry.path, below, seen)
            elif not below:
                yield entry.path

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Return the entries of a folder; none if it cannot be listed."""
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
            names = {entry.name for entry in found}
            is_cache = self._passed_over.has_cache(folder, names, is_named=folder == self._root)
            return [] if is_cache else found
        except OSError as error:
            self._refuse(error)
            return []

    def _refuse(self, error: OSError) -> None:
        """Report a folder that cannot be listed, once.

        :raises CocoaError: If there is no ``on_error``.
        """
        reason = f"cannot be listed ({error.strerror or one_line(error)})"
        if self._on_error is None:
            raise CocoaError(f"{printable(error.filename)} {reason}") from error
        if error.filename not in self._refused:
            self._refused.add(error.filename)
            self._on_error(Path(error.filename), reason)

    def _identity(self, folder: str) -> tuple[int, int]:
        """Return a key that is the same for every path to a folder."""
        try:
            status = os.stat(folder)
        except OSError:
            return -1, hash(folder)  # it is gone: listing it reports that
        return status.st_dev, status.st_ino

    def _batches(self, files: Iterable[str]) -> Iterator[list[str]]:
        """Yield files in batches without duplicates, leaving out those that are passed over."""
        remaining = (file for file in files if not self._passed_over.has_file(file, self._root))
        while batch := list(dict.fromkeys(islice(remaining, BATCH_FILES))):
            yield batch
