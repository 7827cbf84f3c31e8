"""Load any image source (a file, bytes, an address or a PIL image) as upright RGB."""

from __future__ import annotations

import base64
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageFile, UnidentifiedImageError

from cocoa_embed.errors import ImageError, MissingExtraError, TransientImageError, one_line, printable
from cocoa_embed.images.file_names import why_missing
from cocoa_embed.images.formats import icon_sizes, media_type, open_image, png_without_metadata, upright_size
from cocoa_embed.images.to_rgb import has_deep_colours, stretch_dark, upright_rgb
from cocoa_embed.images.urls import is_web, shown_address

ImageSource: TypeAlias = str | Path | bytes | BytesIO | Image.Image
"""A string is a path or a ``data:`` URI."""

Result = TypeVar("Result")

MAX_IMAGE_BYTES = 256 * 2**20
"""Larger files are refused before they are read (256 MiB)."""

MAX_IMAGE_PIXELS = 2**30 // 12
"""Larger images (width x height) are refused before they are decoded: 89 megapixels, Pillow's own limit."""

TRUNCATED = re.compile("truncated|end of file|but only got", re.IGNORECASE)
"""Matches the messages of decoders that miss data."""

READS = 2
"""How many times a file is read if it changes meanwhile."""


def load_image(source: ImageSource) -> Image.Image:
    """Load an image as upright sRGB: the full picture, orientation and colour profile applied, without transparency.

    :param source: A path, a ``data:`` URI, the bytes of a file, a ``BytesIO``, or a PIL image. Web addresses are for
        ``cocoa_embed.sources.keys.load_key``.
    :raises ImageError: If it is missing, unreadable, not an image, truncated, or above ``MAX_IMAGE_BYTES`` or
        ``MAX_IMAGE_PIXELS``.
    """
    if isinstance(source, Image.Image):
        with image_errors("PIL image"):
            check_pixels(source.width, source.height, "PIL image")
            return upright_rgb(source)
    return decode_image(*read_image_source(source))[0]


def read_image_source(source: str | Path | bytes | BytesIO) -> tuple[bytes, str]:
    """Return the bytes of an image file, and its name for errors.

    :raises ImageError: If the file cannot be read.
    """
    if isinstance(source, BytesIO):
        source = source.getvalue()
    if isinstance(source, bytes):
        return source, f"{len(source)} bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        name = f"data: URI of {len(source)} characters"
        return read_data_uri(source, name), name
    if isinstance(source, str) and is_web(source):
        reason = "is a web address; cocoa_embed.sources.keys.load_key fetches it, given its host in allowed_hosts"
        raise ImageError(shown_address(source), reason)
    return read_stable_file(source), printable(source)


def read_data_uri(uri: str, name: str) -> bytes:
    """Return the bytes that a ``data:`` URI holds, in base64 or percent-encoded.

    :param name: The URI's name in errors, which never quote the URI.
    :raises ImageError: If it is malformed, is empty, or holds more than ``MAX_IMAGE_BYTES``.
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


def read_stable_file(path: str | Path) -> bytes:
    """Return the bytes of an image file, all from one moment.

    :raises ImageError: If it is not a readable regular file, is empty, is larger than ``MAX_IMAGE_BYTES``, or keeps
        changing while it is read.
    """
    name = printable(path)
    try:
        # A device is not even opened: opening it can have side effects.
        check_is_file(os.stat(path).st_mode, name)
        for _ in range(READS):
            # Without O_NONBLOCK, a file that has become a pipe since the check would block here until it has a writer.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                before = os.fstat(file.fileno())
                check_is_file(before.st_mode, name)
                check_size(before.st_size, name)
                data = file.read(before.st_size + 1)
                after = os.fstat(file.fileno())
            is_one_state = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if is_one_state and len(data) == before.st_size:
                return data
    except FileNotFoundError:
        reason = "is a link to a file that does not exist" if os.path.islink(path) else why_missing(Path(path))
        raise ImageError(name, reason) from None
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ImageError(name, f"cannot be read ({cause})") from error
    raise ImageError(name, "changed while it was being read")


def check_is_file(mode: int, name: str) -> None:
    """Refuse anything but a regular file.

    :raises ImageError: If it is a folder, a pipe, a device, ...
    """
    if stat.S_ISDIR(mode):
        raise ImageError(name, "is a folder, not an image")
    if not stat.S_ISREG(mode):
        raise ImageError(name, "is not a regular file")


def check_size(size: int, name: str) -> None:
    """Refuse an empty file, or one of more than ``MAX_IMAGE_BYTES``.

    :raises ImageError: If it is one.
    """
    if size == 0:
        raise ImageError(name, "is empty (0 bytes)")
    if size > MAX_IMAGE_BYTES:
        raise ImageError(name, f"is too large: {size} bytes, the limit is {MAX_IMAGE_BYTES}")


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse an image without pixels, or with more than ``MAX_IMAGE_PIXELS``.

    :raises ImageError: If it is one.
    """
    if width * height > MAX_IMAGE_PIXELS:
        size = f"{width} x {height} = {width * height}"
        raise ImageError(name, f"is too large: {size} pixels, the limit is {MAX_IMAGE_PIXELS}")
    if width == 0 or height == 0:
        raise ImageError(name, f"has no pixels ({width} x {height})")


def decode_image(data: bytes, name: str) -> tuple[Image.Image, str]:
    """Decode an image file; return it as upright RGB, with its media type (``image/jpeg``).

    :param data: The bytes of the whole file.
    :param name: The image's name in errors.
    :raises ImageError: If it is not an image, is truncated, or exceeds the limits.
    """

    def decode(image: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, str]:
        if has_deep_colours(image):
            image.load()
            with open_image(data) as again:
                stretch_dark(image, again)
        return upright_rgb(image), media_type(image)

    return with_opened_image(decode, data, name)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return the upright width and height of an image, from the header of its file.

    :param data: The bytes of the whole file.
    :param name: The image's name in errors.
    :raises ImageError: If it is not an image, or exceeds the limits; a file whose pixels are broken may pass.
    """
    return with_opened_image(upright_size, data, name)


def with_opened_image(use: Callable[[ImageFile.ImageFile, bytes], Result], data: bytes, name: str) -> Result:
    """Call ``use`` with the image in a file's bytes, opened but not decoded, and with the bytes.

    :raises ImageError: If there is no image, it exceeds the limits, or ``use`` finds it broken.
    """
    check_size(len(data), name)
    try:
        with image_errors(name):
            for width, height in icon_sizes(data):
                check_pixels(width, height, name)
            with open_image(data) as image:
                check_pixels(image.width, image.height, name)
                return use(image, data)
    except ImageError:
        picture = png_without_metadata(data)
        if picture is data:
            raise
        return with_opened_image(use, picture, name)


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn any exception into an ``ImageError`` that names the image.

    :raises ImageError: Instead of the exception.
    """
    try:
        yield
    except ImageError:
        raise
    except MissingExtraError as error:
        raise TransientImageError(name, f"is a HEIC image, and {error}") from error
    except UnidentifiedImageError:
        reason = "is not an image that can be read (its format is unknown, or its beginning is broken or incomplete)"
        raise ImageError(name, reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"is too large: more pixels than the limit of {MAX_IMAGE_PIXELS}") from error
    except Exception as error:  # decoders raise nearly anything for a broken file
        truncated = isinstance(error, struct.error) or TRUNCATED.search(str(error))
        reason = "is truncated (its data end early)" if truncated else f"cannot be decoded ({one_line(error)})"
        raise ImageError(name, reason) from error
