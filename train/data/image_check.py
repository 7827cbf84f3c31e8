"""Check the images of rows before training, and cache the results by path, size and modification time."""

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from cocoa_embed.data.rows import ItemImage
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.images.load import MAX_IMAGE_BYTES, image_size
from cocoa_embed.train.data.cache import replace_atomically, rows_folder, warn_without_cache
from cocoa_embed.train.data.row_table import RowTable, digest, image_id
from cocoa_embed.train.data.rows import check_aspect_ratio, load_row_image

ImageSize: TypeAlias = tuple[int, int]
"""Width and height in pixels, with the EXIF orientation applied."""

CACHE_FILE = "images-1.npy"
"""The number is the version of ``RECORD`` and of the check."""

RECORD = np.dtype([("id", "<i8"), ("bytes", "<i8"), ("changed", "<i8"), ("width", "<i4"), ("height", "<i4")])
"""A usable image: its ``image_id``, the size and the modification time (ns) of its file, its width and height."""

SAMPLE = 1000
"""The number of images in a sample."""

THREADS = 8
"""The fewest images that are read at once."""

IMAGES_AT_ONCE = 64
IMAGES_IN_MEMORY = 4096
"""Images that wait for a thread."""

HEAD_BYTES, TAIL_BYTES = 2**16, 64


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of checked images, 16 bytes each; the size of any other image is read from its file.

    :param ids: Their ``image_id``, sorted, int64 ``[images]``.
    :param sizes: Width and height, int32 ``[images, 2]``.
    """

    ids: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, image: ItemImage) -> ImageSize:
        number = image_id(image)
        place = int(np.searchsorted(self.ids, number))
        if place == len(self.ids) or self.ids[place] != number:
            return read_size(image)
        width, height = self.sizes[place].tolist()
        return width, height


class CheckedImages(NamedTuple):
    """The result of a check: sizes of images, faults by ``image_id``, and how many images it left out.

    The sizes are of all checked images; that of a broken one is from an earlier check, or else 1 x 1, so that a resumed
    run can replace its row.
    """

    sizes: ImageSizes
    faults: dict[int, str]
    unchecked: int


class ImageCheck:
    """Checks images that are not in the cache or have changed since then, each of them once."""

    def __init__(self) -> None:
        self.known = np.zeros(0, RECORD)
        self.checked = np.zeros(0, np.int64)
        self.faults: dict[int, str] = {}
        try:
            found = np.load(rows_folder() / CACHE_FILE, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # there is none yet, or it is broken
            return
        if found.dtype == RECORD:
            self.known = found

    def __call__(self, rows: RowTable, *, workers: int = 0, sample: int | None = None) -> CheckedImages:
        """Check each distinct image of some rows, with a progress bar on standard error.

        :param workers: Images to read at once, if more than ``THREADS``.
        :param sample: Draw ``SAMPLE`` images by this seed and check no others; by default, check all.
        """
        ids = rows.image_ids()
        total = len(ids)
        if sample is not None and total > SAMPLE:
            ids = np.random.default_rng(sample).choice(ids, SAMPLE, replace=False)
        new = np.setdiff1d(ids, self.checked)
        records, usable = np.zeros(len(new), RECORD), 0
        found = tqdm(self._check(rows.images(new), max(workers, THREADS)), "checking images", len(new), unit="image",
                     disable=not len(new))  # fmt: skip
        try:
            for number, checked in found:
                if isinstance(checked, str):
                    self.faults[number] = checked
                else:
                    records[usable] = (number, *checked)
                    usable += 1
        finally:  # keeps what an interrupted check has found
            self._add(records[:usable])
        self.checked = np.union1d(self.checked, new)
        bad = np.intersect1d(ids, np.array(list(self.faults), dtype=np.int64))
        faults = {number: self.faults[number] for number in bad.tolist()}
        known = self.known[np.isin(self.known["id"], ids)]
        unknown = [(number, 0, 0, 1, 1) for number in np.setdiff1d(bad, known["id"]).tolist()]
        known = np.concatenate([known, np.array(unknown, RECORD)])
        known = known[np.argsort(known["id"])]
        sizes = ImageSizes(known["id"].copy(), np.stack([known["width"], known["height"]], axis=1))
        return CheckedImages(sizes, faults, total - len(ids))

    def _check(self, images: Iterator[tuple[int, ItemImage]], threads: int) -> Iterator["_Checked"]:
        with ThreadPoolExecutor(threads) as pool:
            while waiting := list(islice(images, IMAGES_IN_MEMORY)):
                parts = [waiting[start : start + IMAGES_AT_ONCE] for start in range(0, len(waiting), IMAGES_AT_ONCE)]
                yield from chain.from_iterable(pool.map(self._check_part, parts))

    def _check_part(self, images: Sequence[tuple[int, ItemImage]]) -> list["_Checked"]:
        places = np.searchsorted(self.known["id"], [number for number, _ in images])
        return [(number, self._check_one(number, image, place))
                for (number, image), place in zip(images, places.tolist(), strict=True)]  # fmt: skip

    def _check_one(self, number: int, image: ItemImage, place: int) -> tuple[int, int, int, int] | str:
        try:
            version = _version(image)
            known = self.known[place] if place < len(self.known) else None
            if known is not None and (known["id"], known["bytes"], known["changed"]) == (number, *version):
                return *version, int(known["width"]), int(known["height"])
            return *version, *read_size(image)
        except ImageError as error:
            return error.reason

    def _add(self, records: np.ndarray) -> None:
        """Add records to the cache; they replace earlier records of the same images."""
        earlier = self.known[~np.isin(self.known["id"], records["id"])]
        merged = np.sort(np.concatenate([earlier, records]), order="id")
        if np.array_equal(merged, self.known):
            return
        self.known = merged
        try:
            replace_atomically(rows_folder() / CACHE_FILE, lambda path: np.save(path, merged))
        except OSError as error:
            warn_without_cache(error)


_Checked: TypeAlias = tuple[int, tuple[int, int, int, int] | str]
"""An ``image_id``, and the other values of its ``RECORD``, or its fault."""


def _version(image: ItemImage) -> tuple[int, int]:
    """Return two numbers that change with an image: its file's size and mtime, or its table's fingerprint and 0."""
    if not isinstance(image, Path):
        return digest(image.table.fingerprint), 0
    try:
        found = os.stat(image)
    except (OSError, ValueError):
        load_row_image(image)  # raises the error that training would
        raise
    return found.st_size, found.st_mtime_ns


def read_size(image: ItemImage) -> ImageSize:
    """Return the upright size of an image, from its file's header if the end of the file is there, too.

    :raises ImageError: If it cannot be used; a file whose pixels are broken may pass.
    """
    name = printable(str(image))
    try:
        data = _head_and_tail(image) if isinstance(image, Path) else image.read()
        size = image_size(data, name) if _has_end(data) else None
    except (OSError, ImageError):
        size = None
    return load_row_image(image).size if size is None else check_aspect_ratio(size, name)


def _head_and_tail(path: Path) -> bytes:
    """Return the beginning and the end of a JPEG file, or the whole of any other file."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_IMAGE_BYTES:
        return b""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if head.startswith(b"\xff\xd8"):
            file.seek(max(len(head), found.st_size - TAIL_BYTES))
        return head + file.read()


def _has_end(data: bytes) -> bool:
    """Return whether an image file is in a format that marks its end, and has this mark."""
    if data[:4] == b"RIFF":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    end = data[-TAIL_BYTES:]
    return (data[:2] == b"\xff\xd8" and b"\xff\xd9" in end) or (data[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" in end)
