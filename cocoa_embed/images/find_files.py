"""Find image files: in folders, by patterns, in lists; and read what ``metadata.jsonl`` says of them.

Training and indexing find the same pictures and read the same texts here.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from pathlib import Path
from typing import Any, TypeAlias

from cocoa_embed.errors import CocoaError, SourceError, one_line, printable

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .hif"
    " .jp2 .j2k .jpx .jpc .ppm .pgm .pbm .pnm .tga .ico".split()
)
"""The suffixes, in lower case, by which images are found in a folder."""

LIST_SUFFIX = ".txt"
"""The suffix of a file that names others, one a line."""

METADATA_FILE = "metadata.jsonl"
"""The file of an image folder that holds a JSON object a line: ``file_name``, usually ``text``, and other columns."""

OnError: TypeAlias = Callable[[Path, str], None]
"""What is called with a folder that cannot be listed, and why."""

WILDCARD = re.compile(r"[*?[]")


class MetadataError(SourceError):
    """A row of a table cannot be used."""

    separator = " "


def find_images(paths: Iterable[str | Path], *, on_error: OnError | None = None) -> list[Path]:
    """Return the image files that ``paths`` name, sorted, each once. None is opened, so broken ones are among them.

    - A file stands for itself, whatever its suffix; one that ends in ``.txt`` for the files that it lists, as
      ``read_file_list`` reads it: whether they exist or not, and never for what is in a folder that it names.
    - A folder stands for the files below it that have an image's suffix (``IMAGE_SUFFIXES``, in either case). Links to
      folders are followed, each folder once, so that loops end; what can be reached without a link is.
    - What does not exist is a pattern if it has ``*``, ``?`` or ``[``: as in a shell, with ``**`` for folders of any
      depth. It stands for the folders that match, and for the files that match and have an image's suffix or that of
      the pattern.

    :param on_error: Called for each folder that cannot be listed, which is left out then.
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
    # NUL sorts before everything: a folder's files stand together, as paths compare.
    return [Path(path) for path in sorted(search.found, key=lambda path: path.replace(os.sep, "\0"))]


def search_folder(path: str | Path) -> Path:
    """Return the folder that the paths of images found by ``path`` are relative to.

    It is the folder itself, the folder of a file or of a list, or the part of a pattern before its first ``*``.
    """
    path = Path(path)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        return path.parent
    return split_pattern(path)[0]


def read_file_list(path: str | Path) -> list[Path]:
    """Read a list of files: a path a line, from the list's folder on; or, for names with newlines, NUL after each.

    Empty lines, and lines that begin with ``#``, are left out. What is listed need not exist.

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
    """Return the folder that a pattern begins with, and its parts from the first one with a wildcard on.

    A part that is the name of something, ``photos[1]``, is no wildcard.
    """
    folder = Path()
    for number, part in enumerate(pattern.parts):
        if WILDCARD.search(part) and not os.path.lexists(folder / part):
            return folder, pattern.parts[number:]
        folder = folder / part
    return folder, ()


class FolderSearch:
    """The images found so far, and the folders that were listed, each once."""

    def __init__(self, on_error: OnError) -> None:
        self.found: set[str] = set()
        self._on_error = on_error
        self._listed: set[tuple[int, int]] = set()
        self._links: list[str] = []
        self._refused: set[str] = set()

    def add_folder(self, folder: str) -> None:
        """Find the images below a folder. Links to folders are kept for later."""
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            identity = self._identity(folder)
            if identity in self._listed:
                continue
            self._listed.add(identity)
            folders = []
            for entry in self._entries(folder):
                if is_folder(entry):
                    folders.append(entry.path)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    self._links.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    self.found.add(entry.path.removeprefix("./"))
            waiting += sorted(folders, reverse=True)

    def follow_links(self) -> None:
        """Find the images in the folders that only links lead to."""
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                self.add_folder(link)

    def add_pattern(self, pattern: Path) -> None:
        """Take what matches a pattern: folders are searched, files need an image's suffix or that of the pattern.

        :raises CocoaError: If nothing matches.
        """
        folder, parts = split_pattern(pattern)
        if not parts:
            raise CocoaError(f"{printable(pattern)} does not exist; name a folder of images or an image file")
        matches = list(self._matching(str(folder), parts, set())) if folder.is_dir() else []
        if not matches:
            raise CocoaError(f"{printable(pattern)} does not exist, and nothing matches it as a pattern")
        suffixes = {*IMAGE_SUFFIXES, os.path.splitext(parts[-1])[1].lower()}
        for match in matches:
            if os.path.isdir(match):
                self.add_folder(match)
            elif os.path.splitext(match)[1].lower() in suffixes:
                self.found.add(match.removeprefix("./"))

    def _matching(self, folder: str, parts: tuple[str, ...], seen: set[tuple[int, int, int]]) -> Iterator[str]:
        """Yield what matches the parts of a pattern in a folder; ``seen`` ends loops of links."""
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
            below = parts if part == "**" else rest
            if below and os.path.isdir(entry.path):
                yield from self._matching(entry.path, below, seen)
            elif not below:
                yield entry.path

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Return what is in a folder, and nothing if it cannot be listed."""
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError as error:
            if folder not in self._refused:
                self._refused.add(folder)
                self._on_error(Path(folder), f"cannot be listed ({error.strerror or one_line(error)})")
            return []

    def _identity(self, folder: str) -> tuple[int, int]:
        """Return what tells a folder from all others, whatever path leads to it."""
        try:
            status = os.stat(folder)
        except OSError:
            return -1, hash(folder)  # it is gone: listing it says so
        return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder and no link to one; nothing is looked up where the listing says it."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def read_image_folder_metadata(
    folder: str | Path, *, on_error: Callable[[MetadataError], None] | None = None
) -> list[dict[str, Any]]:
    """Read ``metadata.jsonl`` of an image folder: a JSON object a line, with ``file_name`` relative to the folder.

    :param on_error: Called for each line that cannot be used, which is left out then.
    :return: The rows in the file's order, all columns kept; each has the absolute path of its image, a ``Path``,
        added as ``path``.
    :raises CocoaError: If the file is missing or unreadable or, without ``on_error``, a line is no JSON object, has no
        ``file_name``, has a ``text`` that is no string, or names an image that does not exist; the message says which.
    """
    metadata = Path(folder) / METADATA_FILE
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise CocoaError(
            f"{printable(folder)} has no {METADATA_FILE}; write one JSON object a line, with file_name and text"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CocoaError(f"{printable(metadata)} cannot be read ({one_line(error)})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(read_metadata_line(metadata, number, line))
        except MetadataError as error:
            if on_error is None:
                raise
            on_error(error)
    return rows


def read_metadata_line(metadata: Path, number: int, line: str) -> dict[str, Any]:
    """Return one row of a ``metadata.jsonl``, with the absolute ``path`` of its image.

    :raises MetadataError: If the line is malformed or its image does not exist.
    """
    place = f"{printable(metadata)}:{number}"
    row = parse_json_line(place, line)
    if not isinstance(row, dict):
        raise MetadataError(place, f"is a JSON {type(row).__name__}; expected an object with file_name and text")
    return check_metadata_row(metadata, place, row)


def parse_json_line(place: str, line: str) -> object:
    """Return the value that a line of JSON holds.

    :param place: What to call the line in errors.
    :raises MetadataError: If it is not JSON.
    """
    try:
        return json.loads(line, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MetadataError(place, f"is not JSON ({one_line(error)})") from error


def check_metadata_row(metadata: Path, place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an image folder's metadata, with the absolute ``path`` of its image.

    :param metadata: The file; its folder is where the row's ``file_name`` starts.
    :param place: What to call the row in errors.
    :raises MetadataError: If it has no ``file_name``, a ``text`` that is no string, or an image that does not exist.
    """
    file_name = row.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise MetadataError(place, "has no file_name; expected the image's name relative to the folder, as a string")
    if not isinstance(row.get("text"), str | None):
        raise MetadataError(place, f"has a text that is a JSON {type(row['text']).__name__}; expected a string")
    image = (metadata.parent / file_name).absolute()
    if "\0" in file_name or not image.is_file():
        raise MetadataError(place, f"names {file_name!r}, which is not in {printable(metadata.parent)}")
    return {**row, "path": image}


def refuse_constant(constant: str) -> float:
    """Refuse NaN and the infinities, which Python reads but JSON does not have.

    :raises ValueError: Always.
    """
    raise ValueError(f"{constant} is no JSON value")
