"""Find image files: in folders, by patterns, in lists."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from cocoa_embed.errors import CocoaError, one_line, printable

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .hif"
    " .jp2 .j2k .jpx .jpc .ppm .pgm .pbm .pnm .tga .ico".split()
)
"""The suffixes of image files in a folder, in lower case."""

LIST_SUFFIX = ".txt"
"""The suffix of a file that lists other files, one per line."""

OnError: TypeAlias = Callable[[Path, str], None]
"""Called with a folder that cannot be listed, and the reason."""

WILDCARD = re.compile(r"[*?[]")


def find_images(paths: Iterable[str | Path], *, on_error: OnError | None = None) -> list[Path]:
    """Return the image files that ``paths`` name, sorted, each once. No file is opened: broken images are included.

    - A file is taken, with any suffix. A ``.txt`` file is a list (``read_file_list``): the files that it lists are
      taken, whether they exist or not; folders in it are not searched.
    - A folder is searched, with its subfolders, for files with an image's suffix (``IMAGE_SUFFIXES``, in either case).
      Links to folders are followed, each folder once; a file that is reached both ways keeps the path without a link.
    - A path that does not exist is a pattern if it has ``*``, ``?`` or ``[``: as in a shell, with ``**`` for folders of
      any depth, without links and those that cannot be listed. Folders that match are searched; files that match are
      taken if they have an image's suffix or the pattern's.

    :param on_error: Called for each folder that cannot be listed; the search then skips it.
    :raises CocoaError: If a path does not exist, a pattern matches nothing, a list cannot be read or, without
        ``on_error``, a folder cannot be listed.
    """
    search = FolderSearch(on_error or refuse_folder)
    for path in map(Path, paths):
        if os.path.isdir(path):
            search.add_folder(str(path))
        elif path.suffix.lower() == LIST_SUFFIX and os.path.isfile(path):
            search.found.update(map(str, read_file_list(path)))
        elif os.path.lexists(path):
            search.found.add(str(path))
        else:
            search.add_pattern(path)
    search.follow_links()
    # NUL sorts before everything, so that a folder's files are neighbours, as when paths are compared.
    return [Path(path) for path in sorted(search.found, key=lambda path: path.replace(os.sep, "\0"))]


def search_folder(path: str | Path) -> Path:
    """Return the folder to which the paths of images found by ``path`` are relative.

    It is the folder itself, the folder of a file or of a list, or the part of a pattern before its first wildcard.
    """
    path = Path(path)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        return path.parent
    return split_pattern(path)[0]


def read_file_list(path: str | Path) -> list[Path]:
    """Read a list of files: one path per line, relative to the list's folder; names with newlines end in NUL instead.

    Empty lines and lines that begin with ``#`` are skipped. The files need not exist.

    :raises CocoaError: If the list cannot be read, or is UTF-16.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CocoaError(f"{printable(path)} cannot be read ({error.strerror})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CocoaError(f"{printable(path)} is UTF-16; a list of files is UTF-8, save it as that")
    if b"\0" in data:
        names = data.split(b"\0")
    else:
        lines = (line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        names = [line for line in lines if line.strip() and not line.startswith(b"#")]
    folder = Path(path).parent
    return [folder / os.fsdecode(name) for name in names if name]


def refuse_folder(folder: Path, reason: str) -> None:
    """Refuse a folder that cannot be listed.

    :raises CocoaError: Always.
    """
    raise CocoaError(f"{printable(folder)} {reason}")


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


class FolderSearch:
    """The images found so far, and the folders already listed."""

    def __init__(self, on_error: OnError) -> None:
        self.found: set[str] = set()
        self._on_error = on_error
        self._listed: set[str] = set()
        self._links: list[str] = []

    def add_folder(self, top: str) -> None:
        """Find the images in a folder and its subfolders. Links to folders are kept for ``follow_links``."""
        for folder, subfolders, files in os.walk(top, onerror=self._report):
            real = os.path.realpath(folder)
            if real in self._listed:
                subfolders.clear()
                continue
            self._listed.add(real)
            paths = (os.path.join(folder, name) for name in subfolders)
            self._links += filter(os.path.islink, paths)
            self.found.update(os.path.join(folder, name).removeprefix("./") for name in files if has_image_suffix(name))

    def follow_links(self) -> None:
        """Find the images in folders that only links lead to."""
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                self.add_folder(link)

    def add_pattern(self, pattern: Path) -> None:
        """Add what matches a pattern: folders are searched, files need an image's suffix or the pattern's.

        :raises CocoaError: If nothing matches.
        """
        folder, parts = split_pattern(pattern)
        if not parts:
            raise CocoaError(f"{printable(pattern)} does not exist; name a folder of images or an image file")
        matches = [match for match in sorted(folder.glob("/".join(parts))) if is_shown(match, folder, parts)]
        if not matches:
            raise CocoaError(f"{printable(pattern)} does not exist, and nothing matches it as a pattern")
        suffix = os.path.splitext(parts[-1])[1].lower()
        for match in matches:
            if match.is_dir():
                self.add_folder(str(match))
            elif has_image_suffix(match.name) or match.suffix.lower() == suffix:
                self.found.add(str(match))

    def _report(self, error: OSError) -> None:
        self._on_error(Path(error.filename), f"cannot be listed ({error.strerror or one_line(error)})")


def has_image_suffix(name: str) -> bool:
    """Return whether a file's name ends in one of ``IMAGE_SUFFIXES``, in either case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_shown(match: Path, folder: Path, parts: Sequence[str]) -> bool:
    """Return whether a shell shows a match: names that begin with a dot match only parts that do."""
    dots = sum(part.startswith(".") for part in parts)
    return sum(part.startswith(".") for part in match.relative_to(folder).parts) <= dots
