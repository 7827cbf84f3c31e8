"""Image files made by hand, byte by byte, for what Pillow does not write."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
import pillow_heif
from PIL import Image

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

    As on a phone, the file has the orientation twice: as a property of the picture, and as EXIF.
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


def png_of(samples: np.ndarray, *chunks: bytes, colour: int, depth: int = 0) -> bytes:
    """Return a PNG of samples of 8 or 16 bits, or of packed ones.

    :param samples: Array of shape ``(height, width)`` or ``(height, width, channels)``, uint8 or uint16.
    :param chunks: The chunks before the pixels.
    :param colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
    :param depth: The bits of a sample where they are fewer than 8.
    """
    height, width = samples.shape[:2]
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + packed(row, depth) for row in samples)))
    return png_file(width, height, depth or samples.itemsize * 8, colour, *chunks, pixels)


def packed(row: np.ndarray, depth: int) -> bytes:
    if not depth:
        return row.astype(row.dtype.newbyteorder(">")).tobytes()
    bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


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


def tiff_of(
    samples: np.ndarray, photometric: int, *, order: str = "<", planar: bool = False, alpha: int | None = None
) -> bytes:
    """Return an uncompressed TIFF of samples of 8, 16 or 32 bits.

    :param samples: Array of shape ``(height, width, channels)``.
    :param photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK, 8 LAB.
    :param alpha: The kind of the last channel: 0 unknown, 1 premultiplied alpha, 2 alpha.
    """
    height, width, channels = samples.shape
    samples = samples.astype(samples.dtype.newbyteorder(order))
    planes = [samples[:, :, channel] for channel in range(channels)] if planar else [samples]
    tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (3, [width]),
        257: (3, [height]),
        258: (3, [samples.itemsize * 8] * channels),
        259: (3, [1]),
        262: (3, [photometric]),
        277: (3, [channels]),
        278: (3, [height]),
        284: (3, [2 if planar else 1]),
    }
    if alpha is not None:
        tags[338] = (3, [alpha])
    if samples.dtype.kind != "u":
        tags[339] = (3, [3 if samples.dtype.kind == "f" else 2] * channels)
    return tiff_file(tags, [plane.tobytes() for plane in planes], order)


def webp_canvas(width: int, height: int) -> bytes:
    """Return an animated WebP of one small frame on a canvas of the given size."""

    def bytes_3(number: int) -> bytes:
        return number.to_bytes(3, "little")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data

    picture = encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    frame = bytes_3(0) + bytes_3(0) + bytes_3(7) + bytes_3(7) + bytes_3(100) + b"\0" + picture
    head = chunk(b"VP8X", b"\x02\0\0\0" + bytes_3(width - 1) + bytes_3(height - 1))
    body = b"WEBP" + head + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return chunk(b"RIFF", body)


def jpeg_of_scans(scans: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("L", size), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


def icon_of(png: bytes) -> bytes:
    """Return an ``.ico`` file with any picture, whose directory says 16 x 16."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


def icns_of(picture: bytes) -> bytes:
    """Return an ``.icns`` file with any picture, whose entry says 128 x 128."""
    entry = b"ic07" + struct.pack(">I", 8 + len(picture)) + picture
    return b"icns" + struct.pack(">I", 8 + len(entry)) + entry


def psd_of(image: Image.Image) -> bytes:
    """Return a Photoshop file of an RGB picture: header, no colours, resources or layers, and the pixels by planes."""
    header = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, image.height, image.width, 8, 3)
    return header + bytes(14) + np.asarray(image).transpose(2, 0, 1).tobytes()


def icc_profile(space: bytes, tags: Mapping[bytes, bytes], size: int = 0) -> bytes:
    """Return an ICC profile of a display with these tags, padded to ``size``.

    :param space: The colour space, of four letters: ``RGB ``, ``GRAY`` or ``CMYK``.
    """
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    tagged = (struct.pack(">I", len(tags)) + table + body).ljust(size - 128, b"\0")
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    head = struct.pack(">II4s4s4s4s", 128 + len(tagged), 0, b"\x02\x40\0\0", b"mntr", space, pcs)
    d50 = struct.pack(">iii", 63190, 65536, 54061)
    return (head + bytes(12) + b"acsp" + bytes(28) + d50).ljust(128, b"\0") + tagged


def adobe_rgb(size: int = 0) -> bytes:
    """Return a profile with the primaries and the gamma of Adobe RGB (1998), padded to ``size``."""
    primaries = {b"rXYZ": (39960, 20389, 1276), b"gXYZ": (13453, 41004, 3989), b"bXYZ": (9777, 4143, 48796)}
    tags = {name: b"XYZ " + bytes(4) + struct.pack(">iii", *values) for name, values in primaries.items()}
    return icc_profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(563)), size)


def gamma(value: int) -> bytes:
    """Return the curve of a gamma, in 256ths."""
    return b"curv" + bytes(4) + struct.pack(">IH", 1, value) + bytes(2)


def in_adobe_rgb(image: Image.Image) -> Image.Image:
    """Return an sRGB picture as Adobe RGB has it, by the definitions of both, without profile."""
    srgb = np.asarray(image) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    matrix = [[0.71513, 0.28487, 0.0], [0.0, 1.0, 0.0], [0.0, 0.04117, 0.95883]]
    adobe = np.clip(linear @ np.array(matrix).T, 0, 1) ** (256 / 563)
    return Image.fromarray(np.round(adobe * 255).astype(np.uint8))


def tiff_of_pages(*pages: tuple[Image.Image, int]) -> bytes:
    """Return a TIFF of several directories, each of a picture and its NewSubfileType."""
    buffer = BytesIO()
    first, *others = (image for image, _ in pages)
    first.save(buffer, "TIFF", save_all=True, append_images=others)
    data, place = bytearray(buffer.getvalue()), 4
    for _, subfile in pages:
        (offset,) = struct.unpack_from("<I", data, place)
        (count,) = struct.unpack_from("<H", data, offset)
        entries = data[offset + 2 : offset + 2 + 12 * count]
        (following,) = struct.unpack_from("<I", data, offset + 2 + 12 * count)
        struct.pack_into("<I", data, place, len(data))
        # The lowest tag, which Pillow does not write.
        data += struct.pack("<HHHII", count + 1, 254, 4, 1, subfile) + entries + struct.pack("<I", following)
        place = len(data) - 4
    return bytes(data)
