"""Read the captions of an image folder: from a metadata file, or from text files next to the images."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from cocoa_embed.data import CaptionChoice
from cocoa_embed.data.rows import check_unicode
from cocoa_embed.data.tables import open_table
from cocoa_embed.errors import CocoaError, RowError, printable
from cocoa_embed.images.file_names import as_on_disk, cached_by_folder, why_missing
from cocoa_embed.images.find_files import find_images

METADATA_FILE = "metadata.jsonl"
METADATA_FILES = (METADATA_FILE, "metadata.csv", "metadata.parquet")
"""The files that may hold an image folder's metadata; a folder has one of them."""

FILE_COLUMNS = ("file_name", "filename", "path", "image", "image_path")
"""The columns that may name the image's file; the first that a table has does."""

TEXT_COLUMNS = ("text", "caption")
"""The columns that may hold the caption; the first with a value does, then the list ``captions``."""

RowChoice: TypeAlias = CaptionChoice | Literal["questions"]
"""Which rows training makes from an image: from its captions, or from each entry of the column ``questions``."""

TEXT_SUFFIXES = (".txt", ".caption")
"""The suffixes of a text file next to an image, of the same name, that holds its caption."""

TEXT_NAME = re.compile(rf"({'|'.join(map(re.escape, TEXT_SUFFIXES))})\Z", re.IGNORECASE)
"""Matches the end of such a file's name."""

MAX_TEXT_BYTES = 2**16
"""Larger text files next to images are not taken for captions."""

UNREAD_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""The suffixes of other tables; if metadata are missing, a message points out such a table."""

UNREAD_TABLE = re.compile(r"(metadata|captions?|annotations?|labels?)\.(json|xlsx?|ya?ml|xml)$", re.IGNORECASE)
"""Matches the names of files that nearly certainly describe images, in formats that are not read."""


class DescribedImage(NamedTuple):
    """An image with what its folder says about it.

    :param source: The row's name in error messages.
    :param path: The absolute path of the image.
    :param columns: All values, by column.
    :param file_column: The column that names the image.
    """

    source: str
    path: Path
    columns: Mapping[str, Any]
    file_column: str = FILE_COLUMNS[0]

    @property
    def text_column(self) -> str | None:
        """The column that holds the caption: the first that is not blank, or else not null."""
        named = [column for column in TEXT_COLUMNS if self.columns.get(column) is not None]
        return next(iter([*filter(without_blank_texts(self.columns).get, named), *named]), None)

    @property
    def wordings(self) -> list[str]:
        """The captions that are not blank: the text, or else the entries of the column ``captions``."""
        text, captions = self.columns.get(self.text_column or ""), self.columns.get("captions")
        if isinstance(text, str) and text.strip():
            return [text]
        entries = captions if isinstance(captions, list) else []
        return [entry for entry in entries if isinstance(entry, str) and entry.strip()]

    @property
    def others(self) -> dict[str, Any]:
        """The columns other than those of the file and the text, without blank texts."""
        used = (self.file_column, self.text_column)
        return {name: value for name, value in without_blank_texts(self.columns).items() if name not in used}

    @property
    def text(self) -> str:
        """The image's non-empty text, or its first caption.

        :raises RowError: If it has none.
        """
        text = next(iter(self.wordings), None) if self.text_column is None else self.columns[self.text_column]
        if text is None:
            raise RowError(self.source, f"has no 'text' ({_found(self.columns)}); call the column of captions 'text', "
                           "or remove the row")  # fmt: skip
        if not text.strip():
            raise RowError(self.source, f"has an empty {self.text_column!r}; write one, or remove the row")
        return check_unicode(text, self.source)

    @property
    def captions(self) -> list[str]:
        """The entries of the column ``captions``.

        :raises RowError: If it is not a list of non-empty texts.
        """
        captions = self.columns.get("captions")
        if captions is None:
            return []
        if not isinstance(captions, list):
            raise RowError(self.source, f"'captions' is {captions!r}; expected a list of texts")
        if not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise RowError(self.source, "an entry of 'captions' is empty or not a text")
        return [check_unicode(caption, self.source) for caption in captions]

    @property
    def questions(self) -> list[tuple[str, str]]:
        """The entries of the column ``questions``, as pairs of a question and its answer.

        :raises RowError: If it is not a list of objects with both.
        """
        pairs = self.columns.get("questions")
        try:
            texts = [(pair["question"], pair["answer"]) for pair in pairs or []]
        except (TypeError, KeyError):
            texts = [("", "")]
        if not all(isinstance(text, str) and text.strip() for pair in texts for text in pair):
            raise RowError(self.source, 'an entry of \'questions\' is not {"question": ..., "answer": ...}, both texts')
        return [(check_unicode(one, self.source), check_unicode(other, self.source)) for one, other in texts]

    def texts(self, choice: CaptionChoice) -> list[str]:
        """Return the caption alone, or all ``captions`` of an image that has such a list.

        :raises RowError: If there is none, or the list is malformed.
        """
        return (self.captions if choice == "captions" else []) or [self.text]


def without_blank_texts(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns without those of ``TEXT_COLUMNS`` that are null or blank."""
    return {
        name: value
        for name, value in columns.items()
        if name not in TEXT_COLUMNS or (value is not None and str(value).strip())
    }


def find_metadata(folder: Path) -> Path:
    """Return the metadata file of an image folder, or the folder itself if text files next to its images describe them.

    :raises CocoaError: If the folder does not exist, has several of ``METADATA_FILES``, or has no captions.
    """
    name = printable(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CocoaError(f"{name} {kind}; give a folder of images with {METADATA_FILE}.")
    if (found := metadata_file(folder)) is not None:
        return found
    if any(text_beside(image) for image in find_images([folder])):
        return folder
    others = " or ".join(METADATA_FILES[1:])
    raise CocoaError(
        f"{name} has no {METADATA_FILE} (nor {others}), and no text file next to an image; "
        + (unread_table(os.listdir(folder)) or "write one JSON object per line, with file_name and text.")
    )


def caption_files(folder: Path) -> list[Path]:
    """Return the files that a folder's captions are read from: its metadata file, or its images and their text files.

    :raises CocoaError: As ``find_metadata`` does.
    """
    if (metadata := find_metadata(folder)) != folder:
        return [metadata]
    images = find_images([folder])
    return [*images, *filter(None, map(text_beside, images))]


def metadata_file(folder: Path) -> Path | None:
    """Return the metadata file of a folder, if it has one.

    :raises CocoaError: If it has several.
    """
    found = [file for file in METADATA_FILES if (folder / file).is_file()]
    if len(found) > 1:
        raise CocoaError(f"{printable(folder)} has {' and '.join(found)}; keep one of them.")
    return folder / found[0] if found else None


def unread_table(names: Iterable[str]) -> str | None:
    """Return what to do with a table under another name than ``METADATA_FILES``; None if there is none."""
    ordered = sorted(names)
    table = next((name for name in ordered if name.lower().endswith(UNREAD_SUFFIXES)), None)
    if table is None:
        other = next(filter(UNREAD_TABLE.match, ordered), None)
        return other and f"{other!a} is not read: write it as {METADATA_FILE}, one JSON object per line."
    suffix = os.path.splitext(table)[1].lower().replace(".tsv", ".csv")
    return f"{table!a} is not read: if it describes the images, call it metadata{suffix}."


def read_metadata(metadata: Path, must_exist: bool = True) -> Iterator[DescribedImage | RowError]:
    """Yield the rows of a metadata file in order, or the errors of rows that cannot be used.

    :param metadata: The file, as from ``find_metadata``; names are relative to its folder. A folder: its images with
        the text files next to them.
    :param must_exist: Whether a missing image is an error.
    :raises CocoaError: If the file cannot be read.
    """
    if metadata.is_dir():
        yield from _read_texts(metadata)
        return
    table = open_table(metadata)
    column = next((column for column in FILE_COLUMNS if column in table.columns), None)
    if column is None and len(table) and table.columns:
        raise CocoaError(f"{printable(metadata)} has no column that names the images ({_found(table.columns)}); call it"
                         f" {FILE_COLUMNS[0]!r}.")  # fmt: skip
    for source, row in table.read(table.columns, lists=("captions", "questions")):
        try:
            if isinstance(row, RowError):
                raise row
            column = column or FILE_COLUMNS[0]
            path = _image_path(metadata.parent, source, row, column, must_exist)
            image = DescribedImage(f"{printable(metadata)}, {row[column]}", path, row, column)
            if not isinstance(text := row.get(image.text_column or ""), str | None):
                raise RowError(source, f"has a {image.text_column} that is a {type(text).__name__}; expected a string")
            yield image
        except RowError as error:
            yield error


def _image_path(folder: Path, source: str, row: Mapping[str, Any], column: str, must_exist: bool) -> Path:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise RowError(source, f"has no {column!r} ({_found(row)}); give the image's path, relative to the folder")
    image = as_on_disk((folder / name).absolute())
    if "\0" in name or (must_exist and not image.is_file()):
        _, _, hint = why_missing(image).partition("; ")
        raise RowError(source, f"names {name!r}, which is not in {printable(folder)}" + f"; {hint}" * bool(hint))
    return image


def _found(columns: Iterable[str]) -> str:
    return f"columns found: {', '.join(columns) or 'none'}"


def _read_texts(folder: Path) -> Iterator[DescribedImage | RowError]:
    """Yield the images of a folder and its subfolders with the text files next to them."""
    for image in (path.absolute() for path in find_images([folder])):
        text = text_beside(image)
        try:
            caption = None if text is None else read_text(text)
            if caption is None:
                raise RowError(
                    printable(image), f"has no caption in {image.stem}.txt next to it; write one, or remove it"
                )
            yield DescribedImage(printable(str(text)), image, {"text": caption})
        except RowError as error:
            yield error


def text_beside(image: Path) -> Path | None:
    """Return the text file next to an image that holds its caption, if any, whatever the case of its suffix."""
    names = _text_names(image.parent)
    found = (names.get(image.with_suffix(suffix).name) for suffix in TEXT_SUFFIXES)
    return next((image.with_name(name) for name in found if name is not None), None)


@cached_by_folder
def _text_names(folder: Path) -> dict[str, str]:
    """Return the names of a folder's text files, keyed by the same name with its suffix in lower case."""
    names = sorted(filter(TEXT_NAME.search, os.listdir(folder)))
    return {stem + suffix.lower(): name for name in names for stem, suffix in [os.path.splitext(name)]}


def read_text(path: Path) -> str | None:
    """Read the caption in a text file next to an image; None if it has no letters, like object detection boxes.

    :raises RowError: If it cannot be read, is too large, or is not UTF-8.
    """
    source = printable(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise RowError(source, f"cannot be read ({error.strerror})") from error
    if len(data) > MAX_TEXT_BYTES:
        raise RowError(source, f"is too large for a caption: more than {MAX_TEXT_BYTES} bytes")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RowError(source, "is not UTF-8; save it as UTF-8") from error
    return text if any(map(str.isalpha, text)) else None
