"""Image files made by hand, byte by byte, for what Pillow does not write; and broken, odd and hostile files."""

import os
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pillow_heif
from PIL import Image

from cocoa_embed.images.load import MAX_IMAGE_BYTES

TIFF_TYPES = {1: "B", 2: "B", 3: "H", 4: "I"}

TRANSPOSE = Image.Transpose
AS_STORED = {
    2: TRANSPOSE.FLIP_LEFT_RIGHT,
    3: TRANSPOSE.ROTATE_180,
    4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE,
    6: TRANSPOSE.ROTATE_90,
    7: TRANSPOSE.TRANSVERSE,
    8: TRANSPOSE.ROTATE_270,
}
"""How an upright picture becomes a stored one, from the definition of each EXIF orientation."""


def corners(size: tuple[int, int] = (64, 32)) -> Image.Image:
    """Return a picture that looks different whichever way it is turned: red and green above blue and white."""
    image = Image.new("RGB", size, "white")
    width, height = size[0] // 2, size[1] // 2
    for colour, left, top in (("red", 0, 0), ("lime", width, 0), ("blue", 0, height)):
        image.paste(colour, (left, top, left + width, top + height))
    return image


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.mode == other.mode and image.size == other.size and image.tobytes() == other.tobytes()


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """Return an upright picture as a camera of this orientation stores it."""
    return image.transpose(AS_STORED[orientation]) if orientation in AS_STORED else image


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def heic(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    """Return a lossless HEIC file of a picture that is upright once its orientation is applied.

    As on a telephone, the file has the orientation twice: as a property of the picture, and as EXIF.
    """
    pixels = stored(image, orientation)
    file = pillow_heif.from_bytes(mode=pixels.mode, size=pixels.size, data=pixels.tobytes())
    if orientation != 1:
        file.info["exif"] = exif(orientation).tobytes()
    buffer = BytesIO()
    file.save(buffer, **({"quality": -1, "chroma": 444, "matrix_coefficients": 0} | options))
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    """Return a PNG of a header, the chunks, and an end."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_of(samples: np.ndarray, *chunks: bytes, colour: int) -> bytes:
    """Return a PNG of samples of 8 or 16 bits.

    :param samples: Array of shape ``(height, width)`` or ``(height, width, channels)``, uint8 or uint16.
    :param chunks: The chunks before the pixels.
    :param colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha.
    """
    height, width = samples.shape[:2]
    rows = samples.astype(samples.dtype.newbyteorder(">"))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return png_file(width, height, samples.itemsize * 8, colour, *chunks, pixels)


def tiff_file(tags: Mapping[int, tuple[int, Sequence[int]]], strips: Sequence[bytes], order: str = "<") -> bytes:
    """Return a TIFF of one directory, its offsets (tag 273, or 324 for tiles) filled in.

    :param tags: Type (3 for 16 bits, 4 for 32) and values by tag.
    :param order: ``<`` little-endian, ``>`` big-endian.
    """
    offsets = 324 if 322 in tags else 273
    entries = {**tags, offsets: (4, [0] * len(strips)), offsets + (1 if 322 in tags else 6): (4, [*map(len, strips)])}
    start = 8 + 2 + 12 * len(entries) + 4
    first = start + sum(
        len(long) for long in (tiff_values(entry, order) for entry in entries.values()) if len(long) > 4
    )
    entries[offsets] = (4, [first + sum(map(len, strips[:number])) for number in range(len(strips))])
    directory, values = b"", b""
    for tag in sorted(entries):
        data = tiff_values(entries[tag], order)
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", start + len(values))
        values += data if len(data) > 4 else b""
        directory += struct.pack(f"{order}HHI", tag, entries[tag][0], len(entries[tag][1])) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + directory + struct.pack(f"{order}I", 0) + values + b"".join(strips)


def tiff_values(entry: tuple[int, Sequence[int]], order: str) -> bytes:
    kind, values = entry
    return struct.pack(f"{order}{len(values)}{TIFF_TYPES[kind]}", *values)


def tiff_of(samples: np.ndarray, photometric: int, *, order: str = "<", planar: bool = False) -> bytes:
    """Return an uncompressed TIFF of samples of 8, 16 or 32 bits.

    :param samples: Array of shape ``(height, width, channels)``.
    :param photometric: 0 white is zero, 1 black is zero, 2 RGB.
    """
    height, width, channels = samples.shape
    samples = samples.astype(samples.dtype.newbyteorder(order))
    planes = [samples[:, :, channel] for channel in range(channels)] if planar else [samples]
    tags: dict[int, tuple[int, Sequence[int]]] = {
        **{256: (3, [width]), 257: (3, [height]), 258: (3, [samples.itemsize * 8] * channels), 259: (3, [1])},
        **{262: (3, [photometric]), 277: (3, [channels]), 278: (3, [height]), 284: (3, [2 if planar else 1])},
    }
    if samples.dtype.kind == "f":
        tags[339] = (3, [3] * channels)
    return tiff_file(tags, [plane.tobytes() for plane in planes], order)


def jpeg_of_scans(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("L", (8, 8)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


def icon_of(png: bytes) -> bytes:
    """Return an ``.ico`` file with any picture, whose directory says 16 x 16."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


SIZE = (48, 32)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF"}
FORMATS |= {"jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA", "ico": "ICO"}


class HostileFile(NamedTuple):
    """A file that a search of the folder finds; its error, if it cannot be loaded, contains ``reason_part``."""

    path: Path
    is_good: bool
    reason_part: str


Made: TypeAlias = tuple[str, bytes, str | None]
"""The name and the content of a file to write; the reason is None for a good one."""


def write_hostile_files(folder: Path) -> list[HostileFile]:
    """Write the files to a folder, and return them all.

    The good ones differ in their pixels, except ``link.jpg``, which links to one. Those whose names begin with ``long``
    are good, but too long for models. Root has no unreadable file. The folder also holds a circular link and a file
    that is no image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, data, reason in (*good_files(), *truncated_files(), *lying_files(), *bombs(), *other_contents()):
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        files.append(HostileFile(path, reason is None, reason or ""))
    (folder / "notes.txt").write_text("no image, and not looked for")
    (folder / "round in circles").symlink_to(folder, target_is_directory=True)
    return files + special_files(folder)


def grain(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a picture of random pixels, which no encoder makes small."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def good_files() -> Iterator[Made]:
    """Yield images that are odd, or whose names are, but that can be loaded."""
    for number, (suffix, image_format) in enumerate(FORMATS.items()):
        yield f"good.{suffix}", encoded(grain(number), image_format), None
    yield "turned.hif", heic(grain(21), orientation=6), None
    yield "garbage behind it.jpg", encoded(grain(25), "JPEG") + bytes(range(256)) * 40, None
    yield "orientation 9.jpg", encoded(grain(28), "JPEG", exif=exif(9)), None
    yield "broken exif.jpg", encoded(grain(29), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"), None
    yield "pixel.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), None
    yield "long 1 x 20000.png", encoded(grain(48, (1, 20_000)), "PNG"), None
    yield "long 20000 x 1.jpg", encoded(grain(49, (20_000, 1)), "JPEG"), None
    names = (
        *("really a png.jpg", "really a jpeg.heic", "CAMERA.JPG", "ünï 写真 🌄.png", "two\nlines.png", "--help.png"),
        *(".hidden.png", "a[1]*?.png", "100%25:data.png", 'it\'s "quoted".png', "n" * 251 + ".png", "x.png/inside.png"),
        os.fsdecode(b"caf\xe9 \xff.png"),
    )
    for number, name in enumerate(names, 70):
        yield name, encoded(grain(number), "JPEG" if "JPG" in name or "jpeg" in name else "PNG"), None


def truncated_files() -> Iterator[Made]:
    """Yield the beginnings of good files."""
    whole = {suffix: encoded(grain(0), image_format) for suffix, image_format in FORMATS.items()}
    whole |= {"progressive.jpg": encoded(grain(0), "JPEG", progressive=True), "heic": heic(grain(0))}
    for suffix in whole.keys() - {"ppm", "tga"}:
        for percent in (3, 40, 95):
            yield f"{percent} percent.{suffix}", whole[suffix][: len(whole[suffix]) * percent // 100], ""
        yield f"start.{suffix}", whole[suffix][:16], ""
    yield "empty.jpg", b"", "is empty"


def lying_files() -> Iterator[Made]:
    """Yield files whose parts contradict each other."""
    png, gif, bmp = (bytearray(encoded(grain(1), image_format)) for image_format in ("PNG", "GIF", "BMP"))
    checksum, zlib_stream = bytearray(png), bytearray(png)
    checksum[29] ^= 0xFF
    yield "wrong check sum.png", bytes(checksum), "is not an image"
    start = png.index(b"IDAT") + 4
    zlib_stream[start : start + 9] = b"not zlib!"
    yield "no zlib stream.png", bytes(zlib_stream), "cannot be decoded"
    yield "no width.png", png_file(0, 9, 8, 2), ""
    yield "less than it says.png", png_file(900, 900, 8, 2, png_chunk(b"IDAT", b"")), ""
    struct.pack_into("<HH", gif, 6, 65535, 65535)
    yield "lying about its size.gif", bytes(gif), "limit"
    struct.pack_into("<ii", bmp, 18, 5000, 5000)
    yield "less than it says.bmp", bytes(bmp), "truncated"
    tags = {256: (4, [2**31]), 257: (4, [2**31]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    yield "lying about its size.tif", tiff_file(tags, [bytes(4)]), "limit"
    strips = bytearray(tiff_file(tags | {256: (4, [50]), 257: (4, [50])}, [bytes(4)]))
    struct.pack_into("<I", strips, strips.index(struct.pack("<HHI", 273, 4, 1)) + 4, 2**32 - 1)
    yield "billions of strips.tif", bytes(strips), ""
    yield "directory outside of the file.tif", b"II*\0" + struct.pack("<I", 2**31), ""
    avif = encoded(grain(1), "AVIF")
    yield "overwritten.avif", avif[: avif.index(b"mdat") + 4].ljust(len(avif), b"\0"), "cannot be decoded"


def bombs() -> Iterator[Made]:
    """Yield small files that would take much memory or time."""
    yield "10 gigapixels.png", png_file(100_000, 100_000, 1, 0, png_chunk(b"IDAT", b"")), "limit"
    yield "90 megapixels.png", png_file(10_000, 9_000, 1, 0, png_chunk(b"IDAT", b"")), "is too large"
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
    yield "50 megabytes of text.png", png_file(*SIZE, 8, 2, text), "too large"
    yield "a thousand scans.jpg", jpeg_of_scans(1000), "256 scans"
    metadata = b"\xff\xe1\0\x09Exif\0\0x" * 500_000
    jpeg = encoded(grain(1), "JPEG")
    yield "half a million segments.jpg", jpeg[:2] + metadata + jpeg[2:], "5000 segments"
    yield "a huge picture in it.ico", icon_of(png_file(60_000, 60_000, 8, 6)), "is too large"
    heif = bytearray(heic(grain(1)))
    struct.pack_into(">II", heif, heif.index(b"ispe") + 8, 60_000, 60_000)
    yield "lying about its size.heic", bytes(heif), ""


def other_contents() -> Iterator[Made]:
    """Yield files that are no images, or none that are decoded."""
    contents = {
        "html": b"<!doctype html><html><title>404 Not Found</title></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%touch /tmp/run) (w) file\n",
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(8) + b"\x10\0\x10\0" + bytes(30),
        "zeros": bytes(5000),
    }
    for kind, data in contents.items():
        yield f"{kind}.jpg", data, "is not an image"


def special_files(folder: Path) -> list[HostileFile]:
    """Make paths that are no regular files, and files that cannot be read."""
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        # A socket's path may have about a hundred bytes.
        here = Path.cwd()
        os.chdir(folder)
        server.bind("socket.png")
        os.chdir(here)
    links = {"zero": "/dev/zero", "null": "/dev/null", "gone": "nowhere", "itself": "itself.png", "there": "back again"}
    for name, target in {**links, "back again": "there.png"}.items():
        (folder / (name if " " in name else f"{name}.png")).symlink_to(target)
    with open(folder / "huge.png", "wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    reasons = dict.fromkeys(("pipe", "socket", "zero", "null"), "is not a regular file")
    reasons |= dict.fromkeys(("itself", "there"), "Too many levels of symbolic links")
    reasons |= {"gone": "is a link to a file that does not exist", "huge": "is too large"}
    if os.geteuid() != 0:
        (folder / "unreadable.png").touch(mode=0)
        reasons["unreadable"] = "cannot be read"
    (folder / "link.jpg").symlink_to("good.jpg")
    bad = [HostileFile(folder / f"{name}.png", False, reason) for name, reason in reasons.items()]
    return [*bad, HostileFile(folder / "link.jpg", True, "")]
