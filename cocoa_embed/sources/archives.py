"""Images inside tar files, as WebDataset and img2dataset write them, and inside zip files."""

from __future__ import annotations

import json
import logging
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from posixpath import normpath, splitext
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple
from unicodedata import normalize

from cocoa_embed.data.image_folder import METADATA_FILES, without_blank_texts
from cocoa_embed.data.places import Place, open_binary, reading, suffix_of
from cocoa_embed.errors import CocoaError, ImageError, one_line, printable, until_error
from cocoa_embed.images.find_files import is_image_name
from cocoa_embed.images.load import MAX_IMAGE_BYTES, check_size
from cocoa_embed.sources.base import Record, storable
from cocoa_embed.sources.shard_files import Kind, ShardFile
from cocoa_embed.sources.tables import batches

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

DESCRIPTIONS = frozenset({".txt", ".caption", ".json", ".cls"})
"""The suffixes of the files that describe the image of the same name."""

MAX_SAMPLE_BYTES = 2 * MAX_IMAGE_BYTES
"""The size above which a sample is split to save memory; the files of one image stay together. An image and its texts
fit into it."""

MAX_DESCRIPTION_BYTES = 2**20
"""Larger texts and JSON files are ignored."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    content: bytes | ImageError
    """The error of a file that is too large, or is broken while others are not."""

    @property
    def suffix(self) -> str:
        """The suffix of the name, in lower case."""
        return suffix_of(self.name)

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return stem_of(self.name)

    @property
    def sample(self) -> str:
        """The name of its sample."""
        return sample_of(self.name)


def stem_of(name: str) -> str:
    """Return the name of a file without its suffix."""
    return splitext(normpath(name))[0]


def sample_of(name: str) -> str:
    """Return what the files of one sample of a WebDataset have in common: the name up to the first dot."""
    folder, slash, file = normpath(name).rpartition("/")
    return folder + slash + (file.split(".")[0] or file)


def path_of(file: ShardFile, name: str) -> str:
    """Return the path of a file in an archive, as it is counted if it is passed over."""
    return f"{file.key}/{PurePosixPath(name.lstrip('/'))}"


# Both are in every version of Python, though its documentation does not name them.
EndOfArchive: type[Exception] = vars(tarfile)["EOFHeaderError"]
HeaderError: type[Exception] = vars(tarfile)["HeaderError"]


class StrictTarInfo(tarfile.TarInfo):
    """Raises an error where ``tarfile`` takes a broken header, or the end of the file, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """Read the next header."""
        try:
            return super().fromtarfile(tarfile)
        except EndOfArchive:
            raise
        except HeaderError as error:
            raise BrokenTar(f"it is cut off, or is not a tar file: {one_line(error)}") from error


class BrokenTar(tarfile.TarError):
    """A tar file is cut off, or has something other than a header where a file begins."""


def read_archive(file: ShardFile) -> Iterator[Record]:
    """Yield the images of an archive, described by the files of the same name that follow or precede them.

    :raises Exception: If the archive cannot be read to its end.
    """
    faults: list[Exception] = []
    columns = cache(lambda: columns_beside(file.place))
    apart = ApartDescriptions()
    tables: list[str] = []
    unread: set[str] = set()
    for sample in samples(until_error(read_members(file, tables, unread), faults)):
        apart.look_at(sample)
        for image, metadata in describe_images(sample, columns, unread):
            record = file.make_record(image.name, image.content, metadata)
            # The description of the last image may be in the part that cannot be read.
            yield replace(record, checked_sources=frozenset()) if faults else record
    apart.report(file)
    report_tables(file, tables)
    for fault in faults:
        raise fault


class ApartDescriptions:
    """Finds the descriptions that do not follow or precede their image, but are elsewhere in the archive."""

    def __init__(self) -> None:
        """Begin before the first sample."""
        self._images: set[str] = set()
        """The names of images without their suffixes, and of their samples."""
        self._alone: dict[str, str] = {}
        """The descriptions without an image beside them, each with its name without the suffix."""

    def look_at(self, sample: Sequence[Member]) -> None:
        """Note the images of a sample, and the descriptions whose image is not in it."""
        images = {member.stem for member in sample if is_image_name(member.name)}
        described = {*images, sample[0].sample} if images else images
        self._images |= described
        for member in sample:
            if member.suffix in DESCRIPTIONS and member.stem not in described:
                self._alone[member.name] = member.stem

    def report(self, file: ShardFile) -> None:
        """Count those whose image was elsewhere, and log what to do."""
        found = [name for name, image in self._alone.items() if image in self._images]
        for name in found:
            file.passed_over.note(path_of(file, name), "description apart from its image")
        if found:
            logger.warning(
                "%s: %d description%s, such as %s, did not reach the image of the same name, as the two are apart in "
                "the archive; pack the files in the order of their names, as tar --sort=name does",
                *(printable(file.key), len(found), "s" if len(found) > 1 else "", printable(found[0])),
            )


def samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Yield the files of one sample at a time; a sample of many images is split, but each image keeps its texts."""
    sample: list[Member] = []
    size = 0
    for member in members:
        is_full = size > MAX_SAMPLE_BYTES and member.stem != sample[-1].stem
        if sample and (is_full or member.sample != sample[-1].sample):
            yield sample
            sample, size = [], 0
        sample.append(member)
        size += len(member.content) if isinstance(member.content, bytes) else 0
    if sample:
        yield sample


def describe_images(
    sample: Sequence[Member], columns: Callable[[], Mapping[str, Mapping[str, Any]]], unread: Collection[str]
) -> Iterator[tuple[Member, dict[str, Any]]]:
    """Yield the images of a sample with their metadata.

    A file whose whole name is that of an image, up to its suffix, describes only this image: ``2024.01.05.txt`` is in
    the sample ``2024``, but does not describe ``2024.01.06.jpg``.

    :param columns: Returns the metadata of samples, by name.
    :param unread: The stems of images that are passed over; a text of such an image describes no other.
    """
    images = [each for each in sample if is_image_name(each.name)]
    if not images:
        return
    shared = dict(columns().get(PurePosixPath(sample[0].sample).name, {}))
    own: dict[str, dict[str, Any]] = {image.stem: {} for image in images}
    for each in sample:
        is_used = each.stem in own or each.stem == each.sample or each.stem not in unread
        if is_used and each.suffix in DESCRIPTIONS and isinstance(each.content, bytes):
            own.get(each.stem, shared).update(without_blank_texts(read_description(each.suffix, each.content)))
    for image in images:
        yield image, shared | own[image.stem]


def read_description(suffix: str, content: bytes) -> dict[str, Any]:
    """Return what a file says about the image of the same name: its text, or columns; nothing if it is malformed."""
    text = content.decode("utf-8-sig", "replace").strip()
    if suffix == ".json":
        try:
            columns = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return columns if isinstance(columns, dict) else {}
    if suffix == ".cls":
        # Longer numbers are stored as text; Python refuses to convert thousands of digits.
        return {"cls": int(text) if text.isdecimal() and len(text) < 20 else text}
    return {"text": text} if text else {}


def table_beside(place: Place) -> Place | None:
    """Return the place of the Parquet file that img2dataset writes next to a tar file, whether or not it exists."""
    if suffix_of(place) != ".tar":
        return None
    table = str(place)[: -len(".tar")] + ".parquet"
    return Path(table) if isinstance(place, Path) else table


def columns_beside(place: Place) -> dict[str, dict[str, Any]]:
    """Return the rows of the Parquet file that img2dataset writes next to an archive, by ``key``; none without it."""
    table = table_beside(place)
    if table is None:
        return {}
    try:
        with reading(table):
            rows = (row for batch in batches(table) for row in batch.to_pylist() if "key" in row)
            return {str(row["key"]): without_blank_texts(row) for row in rows}
    except CocoaError as error:
        if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError):
            return {}
        raise ImageError(str(table), f"cannot be read ({one_line(error)})") from error


def read_members(file: ShardFile, tables: list[str], unread: set[str]) -> Iterator[Member]:
    """Yield the images of an archive (the first of those with one name) and the files that describe them, in order.

    In a zip file on this machine, the files of a sample follow each other, wherever they are in the file.

    :param tables: Receives the names of the metadata files of image folders, which are not read.
    :param unread: Receives the names, without suffixes, of images that are passed over.
    :raises Exception: If it cannot be read, or is broken after the files that were yielded.
    """
    names: set[str] = set()

    def on_link(name: str) -> None:
        if is_image_name(name):
            file.passed_over.note(path_of(file, name), "link in an archive")

    # A remote file reads ahead: from one place to another and back, it would fetch megabytes for each file.
    by_sample = isinstance(file.place, Path)
    with open_binary(file.place) as opened:
        for name, size, read in read_entries(opened, file.key, "r|*", on_link, by_sample=by_sample):
            is_image, is_table = is_image_name(name), PurePosixPath(name).name in METADATA_FILES
            if not (is_image or is_table or suffix_of(name) in DESCRIPTIONS):
                continue
            most = MAX_IMAGE_BYTES if is_image else MAX_DESCRIPTION_BYTES
            key = f"{file.key}#{name}"
            read_once = cache(read)  # a tar file is read as a stream, where no file can be read twice
            path = path_of(file, name)
            try:
                if file.passed_over.has_entry(path, file.key, partial(_start, read_once, size)):
                    unread.update({stem_of(name)} if is_image else ())
                    continue
                if is_table:
                    file.passed_over.note(path, "metadata file in an archive")
                    tables.append(name)
                elif is_image and name in names:
                    file.passed_over.note(path, "name again in an archive")
                elif 0 < size <= most:
                    yield Member(name, read_once())
                else:
                    yield Member(name, ImageError(key, f"has {size} bytes; files of 1 to {most} bytes are read"))
            except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # broken, encrypted, an unknown method
                yield Member(name, ImageError(key, f"cannot be read ({one_line(error)})"))
            names.add(name)


def report_tables(file: ShardFile, tables: Sequence[str]) -> None:
    """Log what to do about the metadata files of image folders that were packed whole."""
    if tables:
        logger.warning(
            "%s: metadata files in an archive are not read (%d, such as %s); unpack it and index the folder, or give "
            "each image a .txt or .json of its name",
            *(printable(file.key), len(tables), printable(tables[0])),
        )


def read_member(opened: BinaryIO, file: str, name: str) -> bytes:
    """Return the bytes of one image of an archive; in an uncompressed tar file, other files are skipped by seeking.

    :param name: Accents may be composed in another way than in the archive, if exactly one image fits.
    :raises ImageError: If it is not there, or too large.
    """
    alike: set[str] = set()
    for each, size, read in read_entries(opened, file, "r:*"):
        spelling = storable(each)
        if spelling == name and is_image_name(each):
            check_size(size, printable(f"{file}#{name}"))
            return read()
        if not name.isascii() and normalize("NFC", spelling) == normalize("NFC", name) and is_image_name(each):
            alike.add(spelling)
    if len(alike) == 1:
        opened.seek(0)
        return read_member(opened, file, alike.pop())
    raise ImageError(printable(f"{file}#{name}"), "is not an image in the archive")


def read_entries(
    opened: BinaryIO,
    file: str,
    mode: Literal["r|*", "r:*"],
    on_link: Callable[[str], object] = lambda _: None,
    *,
    by_sample: bool = False,
) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield the name and size of each file in an archive, and a function that reads it, valid until the next file.

    :param mode: The mode of ``tarfile``: read a tar file from start to end, or seek.
    :param on_link: Called with the name of each link in a tar file.
    :param by_sample: Whether the files of a sample in a zip file follow each other.
    """
    if suffix_of(file) == ".zip":
        with zipfile.ZipFile(opened) as archive:
            for entry in sorted_by_sample(archive.infolist()) if by_sample else archive.infolist():
                yield entry.filename, entry.file_size, partial(archive.read, entry)
        return
    with tarfile.open(fileobj=opened, mode=mode, tarinfo=StrictTarInfo) as tar:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # or all headers stay in memory
            if member.isfile():
                yield member.name, member.size, partial(_read_whole, tar, member)
            elif member.islnk() or member.issym():
                on_link(member.name)


def sorted_by_sample(entries: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Return entries with those of a sample together, and in it those of a name; the first of each keep their order.

    A file joins a sample elsewhere only if it is an image, or has the whole name of one or of the sample.
    """
    images = {stem_of(entry.filename) for entry in entries if is_image_name(entry.filename)}
    places: dict[str, int] = {}

    def place(entry: zipfile.ZipInfo) -> list[int]:
        sample, stem = sample_of(entry.filename), stem_of(entry.filename)
        names = (sample if stem in images else stem, stem)
        return [places.setdefault(name, len(places)) for name in names]

    return sorted(entries, key=place)


def _start(read: Callable[[], bytes], size: int, _: str) -> bytes:
    return read() if size <= MAX_DESCRIPTION_BYTES else b""  # no companion is that large


def _read_whole(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    data = opened.read() if opened is not None else b""
    if len(data) < member.size:
        raise BrokenTar(f"{member.name} is cut off: {len(data)} of {member.size} bytes")
    return data


KIND = Kind(
    "archive",
    (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip"),
    read_archive,
    "tarfile",
    "tables",
    settings=("exclude",),
    read_one=read_member,
    beside=table_beside,
)
