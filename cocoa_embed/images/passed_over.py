"""What a search for images passes over: folders of systems and programs, companions of files, and excluded patterns."""

import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from unicodedata import normalize

from pathspec import GitIgnoreSpec

from cocoa_embed.errors import UsageError, printable

logger = logging.getLogger(__name__)

SYSTEM_FOLDERS = frozenset(
    # Thumbnails and indexes of network storage, desktops and phones.
    "@eadir @tmp .@__thumb .@upload_cache .thumbnails .thumbs .picasaoriginals .cache"
    # Bins.
    " $recycle.bin recycler recycled #recycle @recycle .recycle .recycle.bin .trash .trashes .trashed"
    # Snapshots and versions.
    " #snapshot @snapshot @recently-snapshot .snapshot .snapshots ~snapshot .zfs .stversions .sync .dropbox.cache"
    # Systems.
    " __macosx .appledouble .spotlight-v100 .fseventsd .temporaryitems .documentrevisions-v100 lost+found"
    # Version control and notebooks.
    " .git .hg .svn .ipynb_checkpoints".split()
) | {"system volume information", "network trash folder", "temporary items"}
"""The names of folders that hold none of the user's pictures, in lower case."""

SYSTEM_FOLDER = re.compile(r"\.trash-\d+|found\.\d{3}|.+\.lrdata")
"""Matches further such names: the bins of users, files recovered by a disk check, the previews of Lightroom."""

LIBRARY = re.compile(r".+\.(photoslibrary|photolibrary|migratedphotolibrary|aplibrary|cocatalog)")
LIBRARY_FOLDERS = frozenset({"resources", "database", "thumbnails", "previews", "cache"})
"""The folders in a photo library that hold copies of its pictures."""

DELETED = re.compile(r"\.(trashed|pending)-\d+-")
"""The beginning of the names of files that are in a phone's bin, or still being received."""

THUMBNAILS_MARKER = ".cocoa-thumbnails"
"""The file in our folders of thumbnails."""

CACHE_MARKERS = frozenset({THUMBNAILS_MARKER, "CACHEDIR.TAG"})
"""Files that mark a folder as a cache; the second by the Cache Directory Tagging Specification."""

APPLE_DOUBLE = (b"\x00\x05\x16\x07", b"\x00\x05\x16\x00")
"""The first bytes of the companion files (``._a.jpg``) that macOS writes on foreign disks and in archives."""


def is_system_folder(name: str, parent: str = "") -> bool:
    """Return whether a folder of this name, in a folder named ``parent``, holds none of the user's pictures."""
    lower = name.lower()
    in_library = lower in LIBRARY_FOLDERS and LIBRARY.fullmatch(parent.lower()) is not None
    return lower in SYSTEM_FOLDERS or in_library or SYSTEM_FOLDER.fullmatch(lower) is not None


def is_searched(folder: Path, path: Path) -> bool:
    """Return whether a search of a folder reaches a path below it: no folder on the way is a system folder."""
    names = ("", *path.relative_to(folder).parts)
    return not any(is_system_folder(name, parent) for parent, name in pairwise(names))


def first_bytes(path: str) -> bytes:
    """Return the first four bytes of a regular file; none if it cannot be read."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(4) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except (OSError, ValueError):
        return b""


class PassedOver:
    """Decides what a search passes over, and counts it."""

    def __init__(self, exclude: Sequence[str] = ()) -> None:
        """Read patterns of files and folders to exclude, as in a ``.gitignore`` file; case is ignored.

        :raises UsageError: If one is not a pattern.
        """
        self.counts: Counter[str] = Counter()
        """The number of files and folders passed over, by the reason."""
        self.unread: set[str] = set()
        """Archives that have not been read, such as unchanged ones: what patterns match in them is unknown."""
        self._exclude = exclude
        self._used: set[int] = set()
        self._seen: set[str] = set()
        # In a .gitignore file, a line that begins with # is a comment; here it is a name, such as #snapshot.
        lines = [re.sub(r"^#", r"\\#", normalize("NFC", pattern).lower()) for pattern in exclude]
        for line, pattern in zip(lines, exclude, strict=True):
            try:
                is_empty = not any(each.include is not None for each in GitIgnoreSpec.from_lines([line]).patterns)
            except ValueError:
                is_empty = True
            if is_empty:
                raise UsageError(f"{pattern!a} is not a pattern to exclude; give *.gif, drafts/ or 2019/**/small")
        self._spec = GitIgnoreSpec.from_lines(lines)

    @property
    def unused(self) -> list[str]:
        """The patterns that have matched nothing so far."""
        return [pattern for number, pattern in enumerate(self._exclude) if number not in self._used]

    def warn_of_unused(self) -> None:
        """Log a warning for each pattern that matches nothing."""
        for pattern in self.unused if not self.unread else ():
            logger.warning("--exclude %s: nothing matches it", printable(pattern))

    def has_entry(self, path: str, root: str, read_start: Callable[[str], bytes]) -> bool:
        """Return whether a file below ``root`` (an archive or an address), or a folder that holds it, is passed over.

        :param read_start: As for ``has_file``.
        """
        folder = root
        for name in path.removeprefix(root).strip("/").split("/")[:-1]:
            if self.has_folder(folder, name, root):
                return True
            folder = f"{folder}/{name}"
        return self.has_file(path, root, read_start)

    def has_file(self, path: str, root: str, read_start: Callable[[str], bytes] = first_bytes) -> bool:
        """Return whether a file below ``root``, the folder that is searched, is passed over.

        :param read_start: Returns the first bytes of the file at ``path``, at least four if it has them; called only
            for a companion's name.
        """
        name = os.path.basename(path)
        if DELETED.match(name):
            return self.note(path, "deleted file")
        if name.startswith("._") and read_start(path).startswith(APPLE_DOUBLE):
            return self.note(path, "companion of another file")
        return self._excludes(path, root) and self.note(path, "excluded")

    def has_folder(self, parent: str, name: str, root: str) -> bool:
        """Return whether a folder in ``parent``, which is ``root`` or below it, is passed over."""
        path = os.path.join(parent, name)
        if is_system_folder(name, os.path.basename(parent)):
            return self.note(path, "system folder")
        return self._excludes(path, root, slash="/") and self.note(path, "excluded")

    def has_cache(self, folder: str, names: Collection[str], *, is_named: bool) -> bool:
        """Return whether a folder that holds files of these names is passed over as a cache.

        :param is_named: Whether this folder itself was named; then only our own thumbnails are passed over.
        """
        markers = {THUMBNAILS_MARKER} if is_named else CACHE_MARKERS
        return not markers.isdisjoint(names) and self.note(folder, "cache")

    def note(self, path: str, reason: str) -> bool:
        """Count a path, but only once, as a pattern may reach it several times; return True."""
        if path not in self._seen:
            self._seen.add(path)
            self.counts[reason] += 1
        return True

    def _excludes(self, path: str, root: str, slash: str = "") -> bool:
        if not self._exclude:
            return False
        relative = normalize("NFC", os.path.relpath(path, root or os.curdir)).lower()
        found = self._spec.check_file(relative + slash)
        if found.index is not None:
            self._used.add(found.index)
        return bool(found.include)
