"""One door for every image: a file, bytes, an address or a PIL image goes in, upright RGB or an error comes out."""

from __future__ import annotations

import base64
import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageFile, UnidentifiedImageError

from cocoa_embed.errors import ImageError, MissingExtraError, one_line, printable
from cocoa_embed.images.formats import icon_sizes, media_type, open_image, png_without_metadata, upright_size
from cocoa_embed.images.to_rgb import upright_rgb
from cocoa_embed.images.urls import shown_address

if TYPE_CHECKING:
    from cocoa_embed.images.http import Fetcher

ImageSource: TypeAlias = str | Path | bytes | BytesIO | Image.Image
"""A string is a path, a ``data:`` URI or, with a ``Fetcher``, an http or https address."""

Result = TypeVar("Result")

MAX_IMAGE_BYTES = 256 * 2**20
"""Files of more bytes than this are refused before they are read (256 MiB)."""

MAX_IMAGE_PIXELS = 2**30 // 12
"""Images of more pixels than this (width x height) are refused before they are decoded: 89 megapixels, Pillow's own."""

TRUNCATED = re.compile("truncated|end of file|but only got", re.IGNORECASE)
"""How decoders say that they miss data."""

READS = 2
"""How often a file is read that changes meanwhile, before it is given up."""


class FileContent(NamedTuple):
    """What a file held at one moment: its bytes, its modification time (seconds), and its size."""

    data: bytes
    mtime: float
    size: int


def load_image(source: ImageSource, *, fetcher: Fetcher | None = None) -> Image.Image:
    """Return the image as upright RGB: EXIF orientation applied, alpha over white, the first frame of an animation.

    :param source: A path, the bytes of a file, a ``BytesIO``, or a PIL image. A string is a path, unless it begins
        with ``data:``, ``http://`` or ``https://``.
    :param fetcher: What gets images from the web; without it, addresses are refused.
    :raises ImageError: If it is missing, unreadable, no image, truncated, or above ``MAX_IMAGE_BYTES`` or
        ``MAX_IMAGE_PIXELS``.
    """
    if isinstance(source, Image.Image):
        with image_errors("PIL image"):
            check_pixels(source.width, source.height, "PIL image")
            return upright_rgb(source)
    data, name = read_source(source, fetcher)
    return decode_image(data, name)[0]


def read_source(source: str | Path | bytes | BytesIO, fetcher: Fetcher | None) -> tuple[bytes, str]:
    """Return the bytes of an image's file, and what to call it in errors.

    :raises ImageError: If they cannot be had.
    """
    if isinstance(source, BytesIO):
        source = source.getvalue()
    if isinstance(source, bytes):
        return source, f"{len(source)} bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        name = f"data: URI of {len(source)} characters"
        return read_data_uri(source, name), name
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        name = shown_address(source)
        if fetcher is None:
            raise ImageError(
                name, "is a web address; give load_image a cocoa_embed.images.http.Fetcher that allows its host"
            )
        return fetcher.fetch(source), name
    return read_image_bytes(source), printable(source)


def read_data_uri(uri: str, name: str) -> bytes:
    """Return the bytes that a ``data:`` URI holds, in base64 or percent-encoded.

    :param name: What to call it in errors, which never quote it.
    :raises ImageError: If it is malformed, holds nothing, or holds more than ``MAX_IMAGE_BYTES``.
    """
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(name, "has no comma; a data: URI is data:image/png;base64,... or data:image/png,...")
    is_base64 = header.lower().rstrip().endswith(";base64")
    size = len(payload) - 2 * payload.count("%")
    check_size(size * 3 // 4 if is_base64 else size, name)
    try:
        data = unquote_to_bytes(payload)
        if is_base64:
            text = b"".join(data.split()).rstrip(b"=")
            data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise ImageError(name, f"is not valid {'base64' if is_base64 else 'percent-encoding'}") from None
    check_size(len(data), name)
    return data


def read_image_bytes(path: str | Path) -> bytes:
    """Read a file that should hold an image.

    :raises ImageError: As ``read_stable_file`` does.
    """
    return read_stable_file(path).data


def read_stable_file(path: str | Path) -> FileContent:
    """Read a file that should hold an image, and make sure that it is one state of the file that was read.

    :raises ImageError: If it is not a readable regular file, is empty, is larger than ``MAX_IMAGE_BYTES``, or changes
        whenever it is read.
    """
    name = printable(path)
    try:
        # A device is not even opened: some do things when they are.
        check_is_file(os.stat(path).st_mode, name)
        for _ in range(READS):
            if (content := read_once(path, name)) is not None:
                return content
    except FileNotFoundError:
        reason = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise ImageError(name, reason) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise ImageError(name, "is a link that leads back to itself") from None
        cause = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ImageError(name, f"cannot be read ({cause})") from error
    raise ImageError(name, "changed while it was being read")


def read_once(path: str | Path, name: str) -> FileContent | None:
    """Return what a file holds, or None if it changed while it was read.

    :raises ImageError: If it is no regular file, empty, or too large.
    :raises OSError: If it cannot be read.
    """
    # Without O_NONBLOCK, what has become a pipe since it was looked at would wait here for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        before = os.fstat(file.fileno())
        check_is_file(before.st_mode, name)
        check_size(before.st_size, name)
        data = file.read(before.st_size + 1)
        after = os.fstat(file.fileno())
    is_one_state = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if not is_one_state or len(data) != before.st_size:
        return None
    return FileContent(data, before.st_mtime, before.st_size)


def check_is_file(mode: int, name: str) -> None:
    """Refuse what is no regular file.

    :raises ImageError: If it is a folder, a pipe, a device, ...
    """
    if stat.S_ISDIR(mode):
        raise ImageError(name, "is a folder, not an image")
    if not stat.S_ISREG(mode):
        raise ImageError(name, "is not a regular file")


def check_size(size: int, name: str) -> None:
    """Refuse a file of no bytes, or of more than ``MAX_IMAGE_BYTES``.

    :raises ImageError: If it is.
    """
    if size == 0:
        raise ImageError(name, "is empty (0 bytes)")
    if size > MAX_IMAGE_BYTES:
        raise ImageError(name, f"is too large: {size} bytes, the limit is {MAX_IMAGE_BYTES}")


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse an image of no pixels, or of more than ``MAX_IMAGE_PIXELS``.

    :raises ImageError: If it is.
    """
    if width * height > MAX_IMAGE_PIXELS:
        size = f"{width} x {height} = {width * height}"
        raise ImageError(name, f"is too large: {size} pixels, the limit is {MAX_IMAGE_PIXELS}")
    if width == 0 or height == 0:
        raise ImageError(name, f"has no pixels ({width} x {height})")


def decode_image(data: bytes, name: str) -> tuple[Image.Image, str]:
    """Decode the bytes of an image file to an upright RGB image, and tell its media type (``image/jpeg``).

    :param data: The whole file.
    :param name: What to call it in errors.
    :raises ImageError: If it is no image, is truncated, or is above the limits.
    """
    return use_image(lambda image, _: (upright_rgb(image), media_type(image)), data, name)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return the upright width and height of an image, from the header of its file.

    :param data: The whole file.
    :param name: What to call it in errors.
    :raises ImageError: If it is no image, or is above the limits; a file whose pixels are broken may pass.
    """
    return use_image(upright_size, data, name)


def use_image(use: Callable[[ImageFile.ImageFile, bytes], Result], data: bytes, name: str) -> Result:
    """Return what ``use`` makes of the image that a file's bytes hold, opened but not decoded.

    :raises ImageError: If there is none, it is above the limits, or ``use`` finds it broken.
    """
    check_size(len(data), name)

    def attempt(data: bytes) -> Result:
        with image_errors(name):
            for width, height in icon_sizes(data):
                check_pixels(width, height, name)
            with open_image(data) as image:
                check_pixels(image.width, image.height, name)
                return use(image, data)

    try:
        return attempt(data)
    except ImageError:
        picture = png_without_metadata(data)
        if picture is data:
            raise
    return attempt(picture)


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with an image into an ``ImageError`` that names it.

    :raises ImageError: If anything does.
    """
    try:
        yield
    except ImageError:
        raise
    except MissingExtraError as error:
        raise ImageError(name, f"is a HEIC image, and {error}") from error
    except UnidentifiedImageError:
        reason = "is not an image that can be read (its format is unknown, or its beginning broken or incomplete)"
        raise ImageError(name, reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"is too large: more pixels than the limit of {MAX_IMAGE_PIXELS}") from error
    except Exception as error:  # decoders raise nearly anything at a broken file
        truncated = isinstance(error, struct.error) or TRUNCATED.search(str(error))
        reason = "is truncated (its data end early)" if truncated else f"cannot be decoded ({one_line(error)})"
        raise ImageError(name, reason) from error
