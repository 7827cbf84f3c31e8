"""One door for every image: a file, bytes or a PIL image goes in, upright RGB or an :class:`ImageError` comes out.

Files are found here too, and the ``metadata.jsonl`` of an image folder is read here, so that training and indexing see
the same pictures and the same texts.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from cocoa_embed.errors import CocoaError

ImageSource: TypeAlias = str | Path | bytes | BytesIO | Image.Image

MAX_IMAGE_BYTES = 256 * 2**20
"""Files of more bytes than this are refused before they are read (256 MiB)."""

MAX_IMAGE_PIXELS = 2**30 // 12
"""Images of more pixels than this (width x height) are refused before they are decoded: 89 megapixels, Pillow's own."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""The Pillow decoders that are tried. EPS and WMF, which start other programs, are not among them."""

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif"
    " .jp2 .j2k .jpx .jpc .ppm .pgm .pbm .pnm .tga .ico".split()
)
"""The suffixes, in lower case, by which images are found in a folder."""

METADATA_FILE = "metadata.jsonl"
"""The file of an image folder that holds a JSON object a line: ``file_name``, usually ``text``, and other columns."""

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(CocoaError):
    """An image cannot be used. ``source`` says which one, ``reason`` why."""

    def __init__(self, source: str, reason: str) -> None:
        """Keep both parts and join them to the message ``source: reason``."""
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason


class MetadataError(CocoaError):
    """A row of a table cannot be used. ``source`` says which one, ``reason`` why."""

    def __init__(self, source: str, reason: str) -> None:
        """Keep both parts and join them to the message ``source reason``."""
        super().__init__(f"{source} {reason}")
        self.source = source
        self.reason = reason


def load_image(source: ImageSource) -> Image.Image:
    """Return the image as upright RGB: EXIF orientation applied, alpha over white, the first frame of an animation.

    :param source: A path (a string is a path, never a URL), the bytes of a file, a ``BytesIO``, or a PIL image.
    :raises ImageError: If it is missing, unreadable, no image, truncated, or above ``MAX_IMAGE_BYTES`` or
        ``MAX_IMAGE_PIXELS``.
    """
    if isinstance(source, Image.Image):
        return to_upright_rgb(source, "PIL image")
    if isinstance(source, BytesIO):
        source = source.getvalue()
    if isinstance(source, bytes):
        return decode_image(source, f"{len(source)} bytes")[0]
    return decode_image(read_image_bytes(source), printable(source))[0]


def read_image_bytes(path: str | Path) -> bytes:
    """Read a file that should hold an image.

    :raises ImageError: If it is not a readable regular file, is empty, or is larger than ``MAX_IMAGE_BYTES``.
    """
    name = printable(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(name, "is a folder, not an image")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(name, "is not a regular file")
        check_size(status.st_size, name)
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        reason = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise ImageError(name, reason) from None
    except (OSError, ValueError) as error:
        raise ImageError(name, f"cannot be read ({one_line(error)})") from error
    check_size(len(data), name)
    return data


def check_size(size: int, name: str) -> None:
    """Refuse a file of no bytes, or of more than ``MAX_IMAGE_BYTES``.

    :raises ImageError: If it is.
    """
    if size == 0:
        raise ImageError(name, "is empty (0 bytes)")
    if size > MAX_IMAGE_BYTES:
        raise ImageError(name, f"is too large: {size} bytes, the limit is {MAX_IMAGE_BYTES}")


def decode_image(data: bytes, name: str) -> tuple[Image.Image, str]:
    """Decode the bytes of an image file to an upright RGB image, and tell its media type (``image/jpeg``).

    :param data: The whole file.
    :param name: What to call it in errors.
    :raises ImageError: If it is no image, is truncated, or is above the limits.
    """
    check_size(len(data), name)
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            return to_upright_rgb(image, name), Image.MIME.get(str(image.format), "application/octet-stream")
    except UnidentifiedImageError:
        raise ImageError(name, "is not an image that can be read (unknown format or broken header)") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"is too large ({one_line(error)})") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError) as error:
        raise ImageError(name, f"cannot be decoded ({one_line(error)})") from error


def to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return a new RGB image, turned as its EXIF orientation says; the given one is left as it is.

    :raises ImageError: If it has more than ``MAX_IMAGE_PIXELS`` pixels, or its data end early or cannot be converted.
    """
    if image.width * image.height > MAX_IMAGE_PIXELS:
        size = f"{image.width} x {image.height} = {image.width * image.height}"
        raise ImageError(name, f"is too large: {size} pixels, the limit is {MAX_IMAGE_PIXELS}")
    if image.width == 0 or image.height == 0:
        raise ImageError(name, f"has no pixels ({image.width} x {image.height})")
    try:
        image.load()
        transpose = UPRIGHT.get(read_orientation(image))
        rgb = to_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError) as error:
        truncated = "truncated" in str(error).lower()
        reason = "is truncated (its data end early)" if truncated else f"cannot be decoded ({one_line(error)})"
        raise ImageError(name, reason) from error
    return rgb if transpose is None else rgb.transpose(transpose)


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, upright, where the EXIF data are missing or broken."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - a broken EXIF block raises nearly anything, and is no reason to lose the picture
        return 1
    return orientation if isinstance(orientation, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image of any mode: 16-bit and float grey scaled to 8 bits, transparency laid over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(grey_to_8_bit(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    # Pillow knows no way from La (premultiplied grey) to RGBA but through LA.
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def grey_to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Scale grey values of 16 bits (0 to 65535) or floats (0 to 1, to 255 or to 65535, as the largest says) to 8 bits.

    :param pixels: Array of shape ``(height, width)``.
    :return: Array of the same shape, uint8.
    :raises ValueError: If a value is not finite.
    """
    if np.issubdtype(pixels.dtype, np.integer):
        return (np.clip(pixels, 0, 65535) // 257).astype(np.uint8)
    if not np.isfinite(pixels).all():
        raise ValueError("a pixel value is not finite")
    largest = float(pixels.max())
    scale = 255 if largest <= 1 else 1 if largest <= 255 else 255 / 65535
    return np.clip(pixels * scale, 0, 255).astype(np.uint8)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the image files among ``paths`` and below the folders among them, sorted, each once.

    A file named by itself is taken whatever its suffix; in folders the suffix decides (``IMAGE_SUFFIXES``, in either
    case). Links to folders are followed, each folder once, so that loops end.

    :raises CocoaError: If a path does not exist, or a folder cannot be listed.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            found.update(images_below(path))
        elif path.exists() or path.is_symlink():
            found.add(path)
        else:
            raise CocoaError(f"{printable(path)} does not exist; name a folder of images or an image file")
    return sorted(found)


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the files below ``folder`` that have an image's suffix.

    :raises CocoaError: If a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise CocoaError(f"{printable(error.filename)} cannot be listed ({error.strerror})") from error

    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(parent, file) for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES)


def read_image_folder_metadata(folder: str | Path) -> list[dict[str, Any]]:
    """Read ``metadata.jsonl`` of an image folder: a JSON object a line, with ``file_name`` relative to the folder.

    :return: The rows in the file's order, all columns kept; each has the absolute path of its image, a ``Path``,
        added as ``path``.
    :raises CocoaError: If the file is missing or unreadable, or a line is no JSON object, has no ``file_name``, has a
        ``text`` that is no string, or names an image that does not exist; the message says which line.
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
    return [read_metadata_line(metadata, number, line) for number, line in enumerate(lines, 1) if line.strip()]


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


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(path: str | Path) -> str:
    """Return a path as it is shown to people: quoted and escaped only where it holds what cannot be printed."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
