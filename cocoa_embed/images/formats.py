"""Open image files: pick the decoder, refuse files that decode endlessly, and correct what Pillow misreads.

Nothing is decoded here: an opened image knows its size, and its pixels are decoded when it is loaded.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice, takewhile

from PIL import Image, ImageFile, TiffImagePlugin

from cocoa_embed.errors import require
from cocoa_embed.images.parts import PNG_SIGNATURE, full_picture
from cocoa_embed.images.to_rgb import ORIENTATION_TAG, read_orientation

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "ICNS", "PSD")
"""The Pillow decoders that are tried. EPS and WMF are not among them: they start other programs."""

HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
"""The major brands of HEIC files."""

CONTAINER_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})
"""Major brands of both HEIC and AVIF files."""

AVIF_BRANDS = frozenset({b"avif", b"avis"})

JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
"""A marker before a segment, or the end of the image. Inside a scan, FF is followed by 00 or D0 to D7."""

START_OF_SCAN, END_OF_PICTURE = b"\xda", b"\xd9"

PNG_ORIENTATION_KEYWORDS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Where a PNG may keep its orientation, possibly after the pixels."""

MAX_JPEG_SCANS = 256
"""JPEG files with more scans are refused. Encoders write about ten; each scan covers the whole image again, so that 20
bytes can take a tenth of a second."""

MAX_JPEG_SEGMENTS = 5000
"""JPEG files with more segments before their pixels are refused: a hundred megabytes of metadata need 1600. The time in
which Pillow joins EXIF segments grows with the square of their number."""


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open the image in a file's bytes, the full one of several; its pixels are not decoded yet.

    :raises UnidentifiedImageError: If it is not an image.
    :raises ValueError: If it would take hours to decode.
    :raises MissingExtraError: If it is HEIC and the extra ``heic`` is not installed.
    :raises Exception: Anything else that a decoder raises at a broken header.
    """
    if is_heif(data):
        # The class alone: registering it with Pillow would change how other libraries in the process behave.
        return require("pillow_heif", "heic").HeifImageFile(BytesIO(data))
    refuse_endless_jpeg(data)
    data = full_picture(data)
    image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
    if image.format == "PNG":
        scale_transparent_colour(image, bits=data[24])
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        unpack_planes_of_16_bits(image)
    return image


def media_type(image: ImageFile.ImageFile) -> str:
    """Return the media type of an opened image, ``image/jpeg``."""
    if image.format == "HEIF":
        return image.get_format_mimetype() or "image/heif"
    # MPO is a JPEG with more images after the first, as cameras write it.
    return Image.MIME.get("JPEG" if image.format == "MPO" else str(image.format), "application/octet-stream")


def is_heif(data: bytes) -> bool:
    """Return whether the bytes are a HEIC or another HEIF file, but not AVIF."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 1024)
    major, compatible = data[8:12], {data[at : at + 4] for at in range(16, end, 4)}
    return major in HEIF_BRANDS or (major in CONTAINER_BRANDS and not compatible & AVIF_BRANDS)


def refuse_endless_jpeg(data: bytes) -> None:
    """Refuse a JPEG file with more than ``MAX_JPEG_SCANS`` scans, or ``MAX_JPEG_SEGMENTS`` segments before them.

    :raises ValueError: If it is one.
    """
    if not data.startswith(b"\xff\xd8"):
        return
    if exceeds(takewhile(START_OF_SCAN.__ne__, jpeg_markers(data)), MAX_JPEG_SEGMENTS):
        raise ValueError(f"it has more than {MAX_JPEG_SEGMENTS} segments before its pixels")
    # Counting the marker anywhere in the file is fast and enough for nearly all. Data after the image may hold it too.
    if data.count(b"\xff" + START_OF_SCAN) <= MAX_JPEG_SCANS:
        return
    if exceeds(filter(START_OF_SCAN.__eq__, jpeg_markers(data)), MAX_JPEG_SCANS):
        raise ValueError(f"it has more than {MAX_JPEG_SCANS} scans")


def exceeds(items: Iterable[object], limit: int) -> bool:
    """Return whether there are more items than the limit; consume no more than one beyond it."""
    return sum(1 for _ in islice(items, limit + 1)) > limit


def jpeg_markers(data: bytes) -> Iterator[bytes]:
    """Yield the markers of a JPEG file's first image, skipping the contents of its segments."""
    position = 2
    while (match := JPEG_MARKER.search(data, position)) and match[1] != END_OF_PICTURE:
        yield match[1]
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")


def icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the width and height of each image in an ``.ico`` file, and nothing for other files.

    Pillow decodes an icon when it opens it, and its images may be larger than the directory of the file says.
    """
    if not data.startswith(b"\0\0\1\0"):
        return
    for entry in range(struct.unpack_from("<H", data, 4)[0]):
        (start,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        if data[start : start + 8] == PNG_SIGNATURE:
            yield struct.unpack_from(">II", data, start + 16)
        else:
            is_oldest = data[start : start + 4] == b"\x0c\0\0\0"
            width, height = struct.unpack_from("<HH" if is_oldest else "<ii", data, start + 4)
            yield abs(width), abs(height) // 2  # the mask, of the same height, is below the colours


def upright_size(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int]:
    """Return the upright width and height of an opened image; decode it only if there is no other way."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and ORIENTATION_TAG in image.tag_v2:
        return image.size  # Pillow applies the orientation itself
    behind_pixels = data[data.rfind(b"IDAT") :] if image.format == "PNG" else b""
    if any(keyword in behind_pixels for keyword in PNG_ORIENTATION_KEYWORDS):
        image.load()
    turned = read_orientation(image) >= 5
    return (image.height, image.width) if turned else image.size


def scale_transparent_colour(image: Image.Image, *, bits: int) -> None:
    """Scale the transparent colour of an opened PNG to 8 bits, as Pillow scales its pixels but not this colour.

    :param bits: Bits per sample in the file.
    """
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int) and bits < 8:
        image.info["transparency"] = colour * 255 // (2**bits - 1)
    if image.mode == "RGB" and isinstance(colour, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def unpack_planes_of_16_bits(image: TiffImagePlugin.TiffImageFile) -> None:
    """Read the colour planes of an opened TIFF as 16-bit samples where Pillow would read bytes."""
    is_16_bit = set(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ())) == {16}
    if image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) != 2 or not is_16_bit:
        return
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    image.tile = [
        tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:]))
        if tile.codec_name == "raw" and isinstance(tile.args, tuple) and len(str(tile.args[0])) == 1
        else tile
        for tile in image.tile
    ]


def png_without_metadata(data: bytes) -> bytes:
    """Return a PNG file without its metadata chunks; other files unchanged.

    Pillow refuses an image for a text of more than a megabyte, or for a wrong colour profile or metadata checksum.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        # An upper-case first letter marks a critical chunk, which every decoder must understand.
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            kept.append(data[position : position + length + 12])
        position += length + 12
        if kind == b"IEND":
            break
    picture = b"".join(kept)
    return data if picture == data else picture
