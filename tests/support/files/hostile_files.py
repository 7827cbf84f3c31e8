"""Broken, odd and hostile files among good ones."""

import os
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from raw_images import (
    encoded,
    exif,
    heic,
    icns_of,
    icon_of,
    jpeg_of_scans,
    png_chunk,
    png_file,
    psd_of,
    tiff_file,
    webp_canvas,
)

from cocoa_embed.images.load import MAX_IMAGE_BYTES

SIZE = (48, 32)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF"}
FORMATS |= {"jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA", "ico": "ICO"}
TINY = b"\0\0\0\0"


@dataclass(frozen=True)
class HostileFile:
    """A file that a search of the folder finds.

    :param kind: How it is odd or broken; unique.
    :param is_good: It can be loaded.
    :param reason_part: Part of the error if it cannot.
    """

    path: Path
    kind: str
    is_good: bool
    reason_part: str


class Made(NamedTuple):
    """A file to write; the reason is None for a good one."""

    kind: str
    name: str
    data: bytes
    reason: str | None = None


def write_hostile_files(folder: Path) -> list[HostileFile]:
    """Write one file of each kind to a folder, and return them all.

    The good ones differ in their pixels, except the kind ``link to a good file``, which links to the kind ``jpeg``. The
    kinds that begin with ``long`` are good, but too long for models. Root has no kind ``unreadable``. The folder also
    holds a circular link and a file that is no image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for made in (*good_files(), *odd_names(), *truncated_files(), *lying_files(), *bombs(), *other_formats(), *noise()):
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(made.name)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(made.data)
        files.append(HostileFile(path, made.kind, made.reason is None, made.reason or ""))
    (folder / "notes.txt").write_text("no image, and not looked for")
    (folder / "round in circles").symlink_to(folder, target_is_directory=True)
    return files + special_files(folder)


def picture(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a smooth picture that no other number has."""
    colours = np.random.default_rng(number).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def grain(number: int) -> Image.Image:
    """Return a picture of random pixels, which no encoder makes small."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def good_files() -> Iterator[Made]:
    """Yield images that are odd but can be loaded."""
    for number, (suffix, image_format) in enumerate(FORMATS.items()):
        yield Made(image_format.lower(), f"good.{suffix}", encoded(picture(number), image_format))
    yield Made("icns", "good.icns", icns_of(encoded(picture(13), "PNG")))
    yield Made("psd", "good.psd", psd_of(picture(14)))
    yield Made("heic, turned", "turned.hif", heic(picture(21), orientation=6))
    arithmetic = encoded(picture(23).convert("L"), "JPEG").replace(b"\xff\xc0", b"\xff\xc9", 1)
    yield Made("jpeg, arithmetic coding", "arithmetic.jpg", arithmetic)
    yield Made("jpeg, CMYK", "cmyk.jpg", encoded(picture(24).convert("CMYK"), "JPEG"))
    yield Made("jpeg, garbage after it", "tail.jpg", encoded(picture(25), "JPEG") + bytes(range(256)) * 40)
    yield Made("jpeg, orientation 9", "orientation9.jpg", encoded(picture(28), "JPEG", exif=exif(9)))
    broken_exif = b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"
    yield Made("jpeg, broken EXIF", "exif.jpg", encoded(picture(29), "JPEG", exif=broken_exif))
    yield Made("jpeg, huge ICC", "icc.jpg", encoded(picture(30), "JPEG", icc_profile=bytes(4_000_000)))
    several = {"mpo.jpg": "MPO", "some.gif": "GIF", "some.webp": "WEBP", "some.png": "PNG", "some.tif": "TIFF"}
    for number, (name, image_format) in enumerate(several.items(), 32):
        frames = [picture(number), picture(38), picture(39)]
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
        yield Made(f"{image_format.lower()}, several pictures", name, data)
    yield Made("one pixel", "pixel.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG"))
    yield Made("long: 1 x 20000", "high.png", encoded(picture(48, (1, 20_000)), "PNG"))
    yield Made("long: 20000 x 1", "wide.jpg", encoded(picture(49, (20_000, 1)), "JPEG"))
    yield from good_chunks()


def good_chunks() -> Iterator[Made]:
    """Yield PNG and TIFF files whose pictures are whole, and other parts are not."""
    zipped = zlib.compress(bytes(50_000_000))
    for number, (kind, chunk) in enumerate(
        {
            "text that unzips to 50 MB": png_chunk(b"zTXt", b"Comment\0\0" + zipped),
            "profile that unzips to 50 MB": png_chunk(b"iCCP", b"icc\0\0" + zipped),
            "wrong check sum of a text": png_chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!",
            "broken EXIF": png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
            "unknown chunk": png_chunk(b"abCd", b"?" * 99),
        }.items()
    ):
        pixels = png_chunk(
            b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(grain(60 + number))))
        )
        yield Made(f"png, {kind}", f"chunk{number}.png", png_file(*SIZE, 8, 2, chunk, pixels))
    loop = bytearray(encoded(grain(66), "TIFF"))
    (start,) = struct.unpack_from("<I", loop, 4)
    (entries,) = struct.unpack_from("<H", loop, start)
    struct.pack_into("<I", loop, start + 2 + 12 * entries, start)
    yield Made("tiff, directories in a circle", "loop.tif", bytes(loop))


def odd_names() -> Iterator[Made]:
    """Yield good files under names that are hard to handle."""
    names = (
        *("really a png.jpg", "really a jpeg.heic", "CAMERA.JPG", "ünï 写真 🌄.png", "two\nlines.png", "--help.png"),
        *(".hidden.png", "a[1]*?.png", "100%25:data.png", 'it\'s "quoted".png', "n" * 251 + ".png", "x.png/inside.png"),
        os.fsdecode(b"caf\xe9 \xff.png"),
    )
    for number, name in enumerate(names, 70):
        image_format = "JPEG" if "JPG" in name or "jpeg" in name else "PNG"
        yield Made(f"name: {name}", name, encoded(grain(number), image_format))


def truncated_files() -> Iterator[Made]:
    """Yield the beginnings of good files."""
    whole = {suffix: encoded(grain(0), image_format) for suffix, image_format in FORMATS.items() if suffix != "ppm"}
    whole["progressive.jpg"] = encoded(grain(0), "JPEG", progressive=True)
    whole["lzw.tif"] = encoded(grain(0), "TIFF", compression="tiff_lzw")
    whole["heic"], whole["icns"], whole["psd"] = heic(grain(0)), icns_of(encoded(grain(0), "PNG")), psd_of(grain(0))
    del whole["tga"]
    for suffix, data in whole.items():
        for percent in (3, 40, 95):
            kept = data[: len(data) * percent // 100]
            yield Made(f"{suffix}, {percent} % of it", f"truncated{percent}.{suffix}", kept, "")
        yield Made(f"{suffix}, the first 16 bytes", f"start.{suffix}", data[:16], "")
    yield Made("empty", "empty.jpg", b"", "is empty")
    yield Made("one byte", "byte.png", b"\x89", "is not an image")
    yield Made("jpeg, only the header", "header.jpg", whole["jpg"][: whole["jpg"].index(b"\xff\xda")], "")


def lying_files() -> Iterator[Made]:
    """Yield files whose parts contradict each other."""
    png, gif, bmp = (bytearray(encoded(grain(1), image_format)) for image_format in ("PNG", "GIF", "BMP"))
    checksum, zlib_stream = bytearray(png), bytearray(png)
    checksum[29] ^= 0xFF
    yield Made("png, wrong check sum of the header", "crc.png", bytes(checksum), "is not an image")
    start = png.index(b"IDAT") + 4
    zlib_stream[start : start + 9] = b"not zlib!"
    yield Made("png, no zlib stream", "zlib.png", bytes(zlib_stream), "cannot be decoded")
    yield Made("png, no pixels", "noidat.png", png_file(*SIZE, 8, 2), "")
    yield Made("png, no width", "nowidth.png", png_file(0, 9, 8, 2), "")
    yield Made("png, pixels of another size", "short.png", png_file(900, 900, 8, 2, png_chunk(b"IDAT", b"")), "")
    struct.pack_into("<HH", gif, 6, 65535, 65535)
    yield Made("gif, lying about its size", "lying.gif", bytes(gif), "is too large")
    struct.pack_into("<ii", bmp, 18, 2**30, 2**30)
    yield Made("bmp, lying about its size", "lying.bmp", bytes(bmp), "is too large")
    struct.pack_into("<ii", bmp, 18, 5000, 5000)
    yield Made("bmp, less than it says", "less.bmp", bytes(bmp), "is truncated")
    tags = {256: (4, [2**31]), 257: (4, [2**31]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    yield Made("tiff, lying about its size", "lying.tif", tiff_file(tags, [TINY]), "is too large")
    tags |= {256: (4, [50]), 257: (4, [50])}
    yield Made("tiff, less than it says", "less.tif", tiff_file(tags, [TINY]), "")
    yield Made(
        "tiff, tiles of gigabytes", "tile.tif", tiff_file(tags | {322: (4, [2**17]), 323: (4, [2**17])}, [TINY]), ""
    )
    strips = bytearray(tiff_file(tags, [TINY]))
    struct.pack_into("<I", strips, strips.index(struct.pack("<HHI", 273, 4, 1)) + 4, 2**32 - 1)
    yield Made("tiff, billions of strips", "strips.tif", bytes(strips), "")
    yield Made("tiff, directory outside of the file", "outside.tif", b"II*\0" + struct.pack("<I", 2**31), "")
    webp = bytearray(encoded(grain(1), "WEBP"))
    webp[20:200] = bytes(180)
    yield Made("webp, overwritten", "corrupt.webp", bytes(webp), "cannot be decoded")
    avif = encoded(grain(1), "AVIF")
    zeros = avif[: avif.index(b"mdat") + 4].ljust(len(avif), b"\0")
    yield Made("avif, overwritten", "corrupt.avif", zeros, "cannot be decoded")


def bombs() -> Iterator[Made]:
    """Yield small files that would take much memory or time."""
    yield Made(
        "png, 10 gigapixels", "bomb.png", png_file(100_000, 100_000, 1, 0, png_chunk(b"IDAT", b"")), "is too large"
    )
    yield Made(
        "png, 90 megapixels", "bomb90.png", png_file(10_000, 9_000, 1, 0, png_chunk(b"IDAT", b"")), "is too large"
    )
    yield Made("webp, 268 megapixels", "bomb.webp", webp_canvas(16_383, 16_383), "is too large")
    yield Made("jpeg, a thousand scans", "scans.jpg", jpeg_of_scans(1000), "scans")
    metadata = b"\xff\xe1\0\x09Exif\0\0x" * 500_000
    jpeg = encoded(grain(1), "JPEG")
    yield Made("jpeg, half a million segments", "segments.jpg", jpeg[:2] + metadata + jpeg[2:], "segments")
    yield Made("ico, a huge picture in it", "bomb.ico", icon_of(png_file(60_000, 60_000, 8, 6)), "is too large")
    yield Made("icns, a huge picture in it", "bomb.icns", icns_of(png_file(60_000, 60_000, 8, 6)), "is too large")
    psd = psd_of(grain(1))
    yield Made("psd, lying about its size", "bomb.psd", psd[:14] + struct.pack(">II", 30_000, 30_000) + psd[22:], "")
    children = {256: (3, [9]), 257: (3, [9]), 254: (4, [1]), 330: (4, [8] * 500_000)}
    yield Made("tiff, half a million directories in one", "children.tif", tiff_file(children, [TINY]), "")
    heif = bytearray(heic(grain(1)))
    at = heif.index(b"ispe") + 8
    struct.pack_into(">II", heif, at, 60_000, 60_000)
    yield Made("heic, lying about its size", "bomb.heic", bytes(heif), "")


def other_formats() -> Iterator[Made]:
    """Yield files that are no images, or none that are decoded."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch /tmp/run) (w) file\n"
    contents = {
        "html": b"<!doctype html><html><title>404 Not Found</title></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n",
        "postscript": script,
        "eps with a preview": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(script), 0, 0, 0, 0, 0xFFFF) + script,
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(8) + b"\x10\0\x10\0" + bytes(30),
        "mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41\0\0\0\x08free\0\0\0\x08mdat",
        "zeros": bytes(5000),
    }
    for number, (kind, data) in enumerate(contents.items()):
        yield Made(kind, f"other{number}.jpg", data, "is not an image")


def noise() -> Iterator[Made]:
    """Yield random bytes after the first bytes of each format."""
    starts = (
        *(b"", b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", b"GIF89a"),
        *(b"RIFF\xf0\x03\0\0WEBPVP8 ", b"BM", b"II*\0\x08\0\0\0", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0"),
        *(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B", b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"),
        *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"P6\n48 32\n255\n", b"\0\0\1\0\1\0"),
        *(b"icns\0\0\4\0ic07\0\0\3\0\x89PNG\r\n\x1a\n", b"8BPS\0\1\0\0\0\0\0\0\0\3\0\0\0\x20\0\0\0\x20\0\x08\0\3"),
    )
    for number, start in enumerate(starts):
        data = start + np.random.default_rng(number).bytes(1000)
        yield Made(f"random bytes after {start!r}", f"random{number}.jpg", data, "")


def special_files(folder: Path) -> list[HostileFile]:
    """Make paths that are no regular files, and files that cannot be read."""
    made = []

    def bad(name: str, kind: str, reason: str) -> Path:
        made.append(HostileFile(folder / name, kind, False, reason))
        return folder / name

    os.mkfifo(bad("pipe.png", "pipe", "is not a regular file"))
    with socket.socket(socket.AF_UNIX) as server:
        # A socket's path may have about a hundred bytes.
        here = Path.cwd()
        os.chdir(folder)
        server.bind("socket.png")
        os.chdir(here)
    bad("socket.png", "socket", "is not a regular file")
    bad("zero.png", "endless device", "is not a regular file").symlink_to("/dev/zero")
    bad("null.png", "empty device", "is not a regular file").symlink_to("/dev/null")
    bad("dangling.png", "dangling link", "is a link to a file that does not exist").symlink_to("gone.png")
    bad("itself.png", "link to itself", "Too many levels of symbolic links").symlink_to("itself.png")
    bad("there.png", "link to a link and back", "Too many levels of symbolic links").symlink_to("back again")
    (folder / "back again").symlink_to("there.png")
    with open(bad("huge.png", "more bytes than the limit", "is too large"), "wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    if os.geteuid() != 0:
        unreadable = bad("unreadable.png", "unreadable", "cannot be read")
        unreadable.write_bytes(encoded(grain(2), "PNG"))
        unreadable.chmod(0)
    (folder / "link.jpg").symlink_to("good.jpg")
    return [*made, HostileFile(folder / "link.jpg", "link to a good file", True, "")]
