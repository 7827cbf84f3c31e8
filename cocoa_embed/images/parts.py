"""Find the full picture in a file that holds several: among the directories of a TIFF, or the pictures of an icon."""

import struct
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from typing import NamedTuple

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_2000_SIGNATURES = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")

TIFF_HEADERS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
"""The byte order of a TIFF by its first bytes, and whether it is a BigTIFF, whose offsets have 64 bits."""

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, PHOTOMETRIC, CHILDREN = 254, 255, 256, 257, 262, 330
"""The TIFF tags that are read here."""

INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

VIEWABLE = (0, 1, 2, 3, 5, 6, 8)
"""The photometric interpretations of pictures; others are raw sensor data, masks and depths."""

MAX_PARTS = 256
"""The most directories, or pictures of an icon, that are read; further ones are ignored."""

MAX_ENTRIES = 1000
"""The most entries of a directory that are read."""


class Directory(NamedTuple):
    """A picture in a TIFF."""

    offset: int
    width: int
    height: int
    is_part: bool
    """Whether it is a reduced copy or the mask of another one, or not a viewable picture."""
    children: tuple[int, ...] = ()
    """The offsets of directories that belong to it."""


def full_picture(data: bytes) -> bytes:
    """Return a file whose first picture is the full one; most files are like that already.

    In a TIFF, this is the first page that is not a reduced copy, or the largest copy of a pyramid; in an ``.icns``
    file, the largest picture.
    """
    if data[:4] in TIFF_HEADERS:
        return _with_full_directory_first(data)
    return _largest_icon(data) if data.startswith(b"icns") else data


def _with_full_directory_first(data: bytes) -> bytes:
    order, is_big = TIFF_HEADERS[data[:4]]
    kind, place = ("Q", 8) if is_big else ("I", 4)
    try:
        (first,) = struct.unpack_from(order + kind, data, place)
        pages = list(_directories(data, first))
        children = [child for page in pages for child in page.children][:MAX_PARTS]
    except struct.error:  # it is truncated: decoding reports that
        return data
    if len(pages) < 2 and not (pages and pages[0].is_part and children):
        return data
    chosen = _choose(pages) or _choose([each for child in children for each in islice(_directories(data, child), 1)])
    if chosen is None:
        chosen = max(pages, key=lambda page: page.width * page.height)
    if chosen.offset == first:
        return data
    return data[:place] + struct.pack(order + kind, chosen.offset) + data[place + struct.calcsize(kind) :]


def _choose(pages: list[Directory]) -> Directory | None:
    """Return the first full page, or the largest if they are all copies of one another; None if none is full."""
    full = [page for page in pages if not page.is_part]
    return max(full, key=lambda page: page.width) if _is_pyramid(full) else next(iter(full), None)


def _is_pyramid(pages: list[Directory]) -> bool:
    """Return whether pages are one picture at several sizes, although they do not say so.

    Two pages of a document may be scanned at 150 and 300 dots an inch: they have to be further apart.
    """
    largest = max(pages, key=lambda page: page.width, default=None)
    if largest is None or len({page.width for page in pages}) < len(pages):
        return False
    is_similar = all(abs(page.height - largest.height * page.width / largest.width) <= 1 for page in pages)
    return is_similar and (len(pages) > 2 or largest.width >= 3 * min(page.width for page in pages))


def _directories(data: bytes, offset: int) -> Iterator[Directory]:
    """Yield a TIFF's directories from an offset on, up to the end, a loop, or broken data."""
    order, is_big = TIFF_HEADERS[data[:4]]
    count_format, entry_format, next_format = ("Q", "HHQ", "Q") if is_big else ("H", "HHI", "I")
    inline = 8 if is_big else 4
    seen: set[int] = set()
    while offset and offset not in seen and len(seen) < MAX_PARTS:
        seen.add(offset)
        try:
            (count,) = struct.unpack_from(order + count_format, data, offset)
            start, size = offset + struct.calcsize(count_format), 4 + 2 * inline
            values: dict[int, tuple[int, ...]] = {}
            for entry in range(start, start + size * min(count, MAX_ENTRIES), size):
                tag, kind, length = struct.unpack_from(order + entry_format, data, entry)
                if tag not in (SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, PHOTOMETRIC, CHILDREN) or kind not in INTEGER_TYPES:
                    continue
                layout = f"{order}{min(length, MAX_PARTS)}{INTEGER_TYPES[kind]}"
                place = entry + size - inline
                if struct.calcsize(layout) > inline:
                    (place,) = struct.unpack_from(order + next_format, data, place)
                values[tag] = struct.unpack_from(layout, data, place)
            yield _directory(offset, values)
            (offset,) = struct.unpack_from(order + next_format, data, start + size * count)
        except struct.error:
            return


def _directory(offset: int, values: dict[int, tuple[int, ...]]) -> Directory:
    subfile, old, width, height, photometric = (
        (values.get(tag) or (0,))[0] for tag in (SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, PHOTOMETRIC)
    )
    # In the new tag, bit 0 marks a reduced copy and bit 2 a mask; in the old tag, the value 2 is a reduced copy.
    is_part = bool(subfile & 5) or old == 2 or photometric not in VIEWABLE or not width * height
    return Directory(offset, width, height, is_part, values.get(CHILDREN, ()))


def _largest_icon(data: bytes) -> bytes:
    """Return the largest PNG or JPEG 2000 file in an ``.icns`` file; the file itself if it has none."""
    found, position = [(0, data)], 8
    for _ in range(MAX_PARTS):
        size = int.from_bytes(data[position + 4 : position + 8], "big")
        picture = data[position + 8 : position + size]
        if picture.startswith((PNG_SIGNATURE, *JPEG_2000_SIGNATURES)):
            with Image.open(BytesIO(picture), formats=("PNG", "JPEG2000")) as opened:
                found.append((opened.width * opened.height, picture))
        if size < 8:
            break
        position += size
    return max(found, key=lambda each: each[0])[1]
