"""The pages of PDF files as images."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cocoa_embed.data.places import open_binary
from cocoa_embed.errors import ImageError, one_line, printable
from cocoa_embed.images.load import check_size
from cocoa_embed.sources.base import Record
from cocoa_embed.sources.shard_files import Kind, ShardFile, give

if TYPE_CHECKING:
    import pypdfium2

DOTS_PER_POINT = 2.0
"""A point is 1/72 inch: 144 dots per inch."""

MAX_PAGE_PIXELS = 2**22
"""A larger page is drawn smaller: 4 megapixels, more than A3 takes at 144 dots per inch."""

PDFIUM = threading.Lock()
"""Held during every call of pdfium, which several threads must not use at once, whatever document they read."""


def read_pages(file: ShardFile) -> Iterator[Record]:
    """Yield the pages of a document, numbered from 1.

    :raises Exception: If it is encrypted or broken.
    """
    if isinstance(file.place, Path):
        source: Path | bytes = file.place
        check_size(file.place.stat().st_size, file.key)
    else:
        with open_binary(file.place) as opened:
            source = opened.read()
    with open_document(source) as document:
        pages = len(document)
        for number in range(1, pages + 1):
            name = f"page={number}"
            content = draw_page(document, number, f"{file.key}#{name}")
            yield file.make_record(name, content, {"page": number, "pages": pages})


def draw_page(document: pypdfium2.PdfDocument, number: int, name: str) -> bytes | ImageError:
    """Return a page as the bytes of a PNG file, or the error of a page that cannot be drawn.

    :param number: The number of the page, from 1.
    :param name: The page's name in errors.
    """
    try:
        with PDFIUM:
            page = document[number - 1]
            try:
                width, height = page.get_size()
                scale: Any = min(DOTS_PER_POINT, math.sqrt(MAX_PAGE_PIXELS / max(width * height, 1)))
                image = page.render(scale=scale).to_pil().convert("RGB")
            finally:
                page.close()
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    except Exception as error:  # noqa: BLE001 - a broken page raises nearly anything
        return ImageError(name, f"cannot be drawn ({one_line(error)})")


def read_page(opened: BinaryIO, file: str, name: str) -> bytes:
    """Return one page as the bytes of a PNG file; the other pages are not drawn.

    :param name: ``page=3``.
    :raises ImageError: If there is no such page, or it cannot be drawn.
    """
    digits = re.fullmatch(r"page=(\d+)", name)
    key = printable(f"{file}#{name}")
    with open_document(opened) as document:
        if digits is None or not 1 <= int(digits[1]) <= len(document):
            raise ImageError(key, f"is not a page; the document has page=1 to page={len(document)}")
        return give(draw_page(document, int(digits[1]), key))


@contextmanager
def open_document(source: Path | bytes | BinaryIO) -> Iterator[pypdfium2.PdfDocument]:
    """Open a document, with its forms.

    :raises ValueError: If it is encrypted.
    :raises Exception: If it is broken.
    """
    import pypdfium2

    with PDFIUM:
        try:
            document = pypdfium2.PdfDocument(source)
        except pypdfium2.PdfiumError as error:
            if "password" not in str(error).lower():
                raise
            raise ValueError("it is encrypted; save it without a password") from error
        document.init_forms()
    try:
        yield document
    finally:
        with PDFIUM:
            document.close()


KIND = Kind("pdf", (".pdf",), read_pages, "pypdfium2", "pdf", read_one=read_page)
