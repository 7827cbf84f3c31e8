import struct
from io import BytesIO

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from raw_images import corners, encoded, icns_of, png_file, psd_of, same, tiff_file, tiff_of, tiff_of_pages

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import image_size, load_image
from cocoa_embed.images.parts import MAX_PARTS, full_picture

LARGE, MIDDLE, SMALL = corners((400, 300)), corners((200, 150)), corners((40, 30))
PAGE = Image.new("RGB", (300, 400), "teal")
FULL, REDUCED, PAGE_OF_SEVERAL, MASK = 0, 1, 2, 4


def loaded(data: bytes) -> Image.Image:
    image = load_image(data)
    assert image_size(data, "photo") == image.size
    return image


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([(SMALL, REDUCED), (LARGE, FULL)], LARGE),
        ([(SMALL, REDUCED), (PAGE, MASK), (LARGE, PAGE_OF_SEVERAL), (PAGE, PAGE_OF_SEVERAL)], LARGE),
        ([(LARGE, FULL), (MIDDLE, REDUCED), (SMALL, REDUCED)], LARGE),
        ([(PAGE, PAGE_OF_SEVERAL), (LARGE, PAGE_OF_SEVERAL)], PAGE),
        ([(LARGE, FULL), (MIDDLE, FULL), (SMALL, FULL)], LARGE),
        ([(SMALL, FULL), (MIDDLE, FULL), (LARGE, FULL)], LARGE),
        ([(SMALL, FULL), (LARGE, FULL)], LARGE),
        ([(MIDDLE, FULL), (LARGE, FULL)], MIDDLE),
        ([(MIDDLE, FULL), (MIDDLE, FULL), (LARGE, FULL)], MIDDLE),
        ([(SMALL, REDUCED), (MIDDLE, REDUCED)], MIDDLE),
        ([(SMALL, REDUCED)], SMALL),
    ],
)
def test_the_full_picture_among_the_pages_of_a_tiff_is_taken(
    pages: list[tuple[Image.Image, int]], expected: Image.Image
) -> None:
    """A pyramid is the largest copy; two pages that differ by a factor of two are pages."""
    data = tiff_of_pages(*pages)
    with Image.open(BytesIO(data)) as opened:
        assert (getattr(opened, "n_frames", 1), opened.size) == (len(pages), pages[0][0].size)
    assert same(loaded(data), expected)


def test_a_file_with_offsets_of_64_bits_is_read_too() -> None:
    data = encoded(SMALL, "TIFF", save_all=True, append_images=[LARGE], big_tiff=True)
    assert data.startswith(b"II+\0")
    assert same(loaded(data), LARGE)


@pytest.mark.parametrize("order", "<>")
def test_a_full_picture_below_a_reduced_one_is_taken_if_it_is_no_raw_data(order: str) -> None:
    small, large = (np.asarray(image) for image in (SMALL, LARGE))
    below = tiff_of(large, 2, order=order)
    tags = {256: (3, [40]), 257: (3, [30]), 258: (3, [8] * 3), 259: (3, [1]), 262: (3, [2]), 277: (3, [3])}
    tags |= {278: (3, [30]), 254: (4, [REDUCED]), 330: (4, [0])}
    above = tiff_file(tags, [small.tobytes()], order)
    (place,) = (at for at in range(10, 10 + 12 * len(tags) + 24, 12) if above[at : at + 2] in (b"\x4a\1", b"\1\x4a"))
    # The directory of the large picture goes to the end, with the offsets in it adjusted.
    shift = len(above)
    moved = bytearray(below)
    for at in range(10, 10 + 12 * struct.unpack_from(f"{order}H", below, 8)[0], 12):
        tag, _, count = struct.unpack_from(f"{order}HHI", below, at)
        if tag == 273 or (tag == 258 and count > 2):
            struct.pack_into(f"{order}I", moved, at + 8, struct.unpack_from(f"{order}I", below, at + 8)[0] + shift)
    data = above[: place + 8] + struct.pack(f"{order}I", shift + 8) + above[place + 12 :] + bytes(moved)
    assert same(loaded(data), LARGE)
    photometric = data.index(struct.pack(f"{order}HHI", 262, 3, 1), shift) + 8
    raw = data[:photometric] + struct.pack(f"{order}H", 32803) + data[photometric + 2 :]
    assert same(loaded(raw), SMALL)


def test_tiff_directories_that_lead_nowhere_or_in_circles_are_harmless() -> None:
    data = tiff_of_pages((SMALL, REDUCED), (LARGE, FULL))
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    link = first + 2 + 12 * count
    for following, size in ((first, SMALL.size), (2**32 - 9, SMALL.size), (len(data) - 3, SMALL.size)):
        assert loaded(data[:link] + struct.pack("<I", following) + data[link + 4 :]).size == size
    many = tiff_of_pages(*[(SMALL, REDUCED)] * (MAX_PARTS + 1), (LARGE, FULL))
    assert loaded(many).size == SMALL.size
    for end in range(4, len(data), 97):
        assert full_picture(data[:end])


def test_the_largest_picture_of_an_icon_is_taken() -> None:
    large = corners((1024, 1024))
    data = encoded(corners((512, 512)), "ICNS", append_images=[large])
    assert same(loaded(data), large)
    jpeg_2000 = encoded(corners((128, 128)), "JPEG2000", irreversible=False)
    assert same(loaded(icns_of(jpeg_2000)), corners((128, 128)))
    with pytest.raises(ImageError):
        load_image(icns_of(b""))
    with pytest.raises(ImageError, match="is too large"):
        load_image(icns_of(png_file(30000, 30000, 8, 0)))


def test_the_main_picture_of_a_photograph_with_several_is_taken() -> None:
    several = pillow_heif.from_pillow(SMALL)
    several.add_from_pillow(LARGE)
    buffer = BytesIO()
    several.save(buffer, quality=-1, chroma=444, matrix_coefficients=0, primary_index=1)
    assert same(loaded(buffer.getvalue()), LARGE)
    assert loaded(encoded(LARGE, "MPO", save_all=True, append_images=[SMALL])).size == LARGE.size


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(LARGE, image_format, save_all=True, append_images=[PAGE.resize(LARGE.size)], **options)
    with Image.open(BytesIO(data)) as opened:
        assert opened.n_frames == 2
    assert same(loaded(data), LARGE)


def test_the_whole_of_a_layered_picture_is_taken() -> None:
    assert same(loaded(psd_of(SMALL)), SMALL)
