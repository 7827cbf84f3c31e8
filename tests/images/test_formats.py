import re
import struct
import sys
from io import BytesIO

import pytest
from PIL import Image, UnidentifiedImageError
from raw_images import corners, encoded, exif, heic, icon_of, jpeg_of_scans, png_chunk, png_file, same, stored

from cocoa_embed.errors import ImageError, install_command
from cocoa_embed.images.formats import MAX_JPEG_SCANS, MAX_JPEG_SEGMENTS, icon_sizes, jpeg_markers
from cocoa_embed.images.load import decode_image, image_size, load_image


def test_reading_heic_changes_nothing_for_others() -> None:
    before = set(Image.registered_extensions())
    load_image(heic(corners()))
    assert set(Image.registered_extensions()) == before
    with pytest.raises(UnidentifiedImageError):
        Image.open(BytesIO(heic(corners())))


def test_without_its_extra_a_heic_is_refused_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(corners())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for use in (image_size, decode_image):
        with pytest.raises(ImageError, match=f"^a.heic: is a HEIC image, .*{re.escape(install_command('heic'))}$"):
            use(data, "a.heic")
    assert load_image(encoded(corners(), "AVIF")).size == (64, 32)


def test_media_types_are_those_of_the_content() -> None:
    files = {
        f"image/{name}": encoded(corners(), name) for name in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")
    }
    files["image/heic"] = heic(corners())
    assert [decode_image(data, "photo.jpg")[1] for data in files.values()] == list(files)
    several = encoded(corners(), "MPO", save_all=True, append_images=[corners()])
    assert decode_image(several, "photo.jpg")[1] == "image/jpeg"


def test_a_jpeg_of_more_scans_or_segments_than_the_limit_is_refused() -> None:
    picture = encoded(corners(), "JPEG")
    segment = b"\xff\xe1\0\x09Exif\0\0x"
    with pytest.raises(ImageError, match=f"more than {MAX_JPEG_SCANS} scans"):
        load_image(jpeg_of_scans(MAX_JPEG_SCANS + 1))
    assert load_image(jpeg_of_scans(MAX_JPEG_SCANS)).size == (8, 8)
    with pytest.raises(ImageError, match=f"more than {MAX_JPEG_SEGMENTS} segments"):
        load_image(picture[:2] + segment * (MAX_JPEG_SEGMENTS + 1) + picture[2:])
    assert load_image(picture[:2] + segment * (MAX_JPEG_SEGMENTS - 50) + picture[2:]).size == (64, 32)


def test_scans_of_other_pictures_in_a_jpeg_are_not_counted() -> None:
    thumbnail = b"Exif\0\0" + b"\xff\xda" * 300
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    picture = encoded(corners(), "JPEG")
    data = picture[:2] + segment + picture[2:] + b"film" + b"\xff\xda" * 300
    assert data.count(b"\xff\xda") > MAX_JPEG_SCANS
    assert list(jpeg_markers(data)).count(b"\xda") == 1
    assert load_image(data).size == (64, 32)


def test_the_size_of_an_icon_is_that_of_its_picture() -> None:
    data = icon_of(encoded(Image.new("RGB", (300, 200), "red"), "PNG"))
    assert list(icon_sizes(data)) == [(300, 200)]
    assert image_size(data, "icon") == load_image(data).size == (300, 200)
    old = encoded(Image.new("RGB", (32, 32), "red"), "ICO", bitmap_format="bmp", sizes=[(32, 32)])
    assert list(icon_sizes(old)) == [(32, 32)]
    at = old.index(struct.pack("<III", 40, 32, 64))
    oldest = old[:at] + struct.pack("<IHH", 12, 32, 64) + old[at + 8 :]
    assert list(icon_sizes(oldest)) == [(32, 32)]
    assert list(icon_sizes(encoded(corners(), "PNG"))) == []


def test_an_orientation_behind_the_pixels_of_a_png_counts_too() -> None:
    data = encoded(stored(corners(), 6), "PNG")
    chunk = png_chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    end = data.index(b"IEND") - 4
    late = data[:end] + chunk + data[end:]
    assert image_size(late, "photo") == load_image(late).size == (64, 32)
    assert same(load_image(late), corners())


def test_the_size_is_read_without_the_pixels() -> None:
    broken = png_file(500, 400, 8, 2, png_chunk(b"IDAT", b"no zlib"))
    assert image_size(broken, "photo") == (500, 400)
    with pytest.raises(ImageError):
        load_image(broken)
