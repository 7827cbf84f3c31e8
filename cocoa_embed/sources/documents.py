"""The pages of PDF files as images."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from cocoa_embed.data.places import open_binary
from cocoa_embed.errors import ImageError, one_line
from cocoa_embed.images.load import check_size
from cocoa_embed.sources.base import Record
from cocoa_embed.sources.shard_files import Kind, ShardFile, shard_error

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

    :raises ImageError: If it is encrypted or broken.
    """
    with open_document(file) as document:
        with PDFIUM:
            pages = len(document)
        for number in range(1, pages + 1):
            name = f"page={number}"
            content = draw_page(document, number, f"{file.key}#{name}")
            yield file.make_record(name, content, {"page": number, "pages": pages})


def read_page(file: ShardFile, number: int) -> bytes:
    """Return one page of a document as the bytes of a PNG file.

    :param number: Of the page, from 1.
    :raises ImageError: If the document is encrypted or broken, or the page cannot be drawn.
    """
    with open_document(file) as document:
        content = draw_page(document, number, f"{file.key}#page={number}")
    if isinstance(content, ImageError):
        raise content
    return content


@contextmanager
def open_document(file: ShardFile) -> Iterator[pypdfium2.PdfDocument]:
    """Open a document.

    :raises ImageError: If it is encrypted or broken.
    """
    import pypdfium2

    with ExitStack() as stack:
        try:
            if isinstance(file.place, Path):
                source: Path | bytes = file.place
                check_size(file.place.stat().st_size, file.key)
            else:
                with open_binary(file.place) as opened:
                    source = opened.read()
            with PDFIUM:
                document = pypdfium2.PdfDocument(source)
                stack.callback(_close, document)
                document.init_forms()
        except ImageError:
            raise
        except Exception as error:  # remote file systems raise nearly anything
            encrypted = "password" in str(error).lower()
            reason = "it is encrypted; save it without a password" if encrypted else one_line(error)
            raise shard_error(file, 0, reason) from error
        yield document


def draw_page(document: pypdfium2.PdfDocument, number: int, name: str) -> bytes | ImageError:
    """Return a page as the bytes of a PNG file, or the error of a page that cannot be drawn.

    :param number: Of the page, from 1.
    :param name: The page's name in errors.
    """
    try:
        with PDFIUM:
            page = document[number - 1]
            try:
                width, height = page.get_size()
                scale = min(DOTS_PER_POINT, math.sqrt(MAX_PAGE_PIXELS / max(width * height, 1)))
                image = page.render(scale=scale).to_pil().convert("RGB")
            finally:
                page.close()
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    except Exception as error:  # noqa: BLE001 - a broken page raises nearly anything
        return ImageError(name, f"cannot be drawn ({one_line(error)})")


def _close(document: pypdfium2.PdfDocument) -> None:
    with PDFIUM:
        document.close()


KIND = Kind("pdf", (".pdf",), read_pages, "pypdfium2", "pdf")
