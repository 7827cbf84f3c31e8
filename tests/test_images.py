import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocoa_embed import images
from cocoa_embed.errors import CocoaError
from cocoa_embed.images import (
    ImageError,
    decode_image,
    find_images,
    load_image,
    read_image_bytes,
    read_image_folder_metadata,
)

CLOSE = 15
"""More than lossy compression changes these pictures by, and far less than turning them does."""

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """Return a picture whose four quarters differ: red and green above blue and white."""
    image = Image.new("RGB", (32, 16), WHITE)
    image.paste(RED, (0, 0, 16, 8))
    image.paste(GREEN, (16, 0, 32, 8))
    image.paste(BLUE, (0, 8, 16, 16))
    return image


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.mode == other.mode and image.size == other.size and image.tobytes() == other.tobytes()


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_the_same_pixels_come_out_of_every_lossless_container(image_format: str) -> None:
    assert same(load_image(encoded(corners(), image_format)), corners())


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_lossy_containers_give_nearly_the_same_pixels(image_format: str) -> None:
    loaded = load_image(encoded(corners(), image_format, quality=95))
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded, dtype=float) - np.asarray(corners(), dtype=float)).mean() < CLOSE


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_turns_the_picture_upright(image_format: str, orientation: int) -> None:
    stored = corners()
    # The way back from upright to what a camera stores, from the definition of each orientation.
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    if orientation in turns:
        stored = stored.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    loaded = load_image(encoded(stored, image_format, exif=exif, **options))
    assert loaded.size == corners().size
    difference = np.abs(np.asarray(loaded, dtype=float) - np.asarray(corners(), dtype=float))
    assert difference.mean() < CLOSE


def test_a_pil_image_is_turned_too_and_left_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    given = Image.open(BytesIO(encoded(corners(), "PNG", exif=exif)))
    assert load_image(given).size == (16, 32)
    assert given.size == (32, 16)
    plain = corners()
    loaded = load_image(plain)
    loaded.paste(BLUE, (0, 0, 32, 16))
    assert same(plain, corners())


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    data = encoded(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert load_image(data).size == (32, 16)


def test_transparency_is_laid_over_white() -> None:
    rgba = corners().convert("RGBA")
    rgba.putalpha(0)
    assert load_image(encoded(rgba, "PNG")).getcolors() == [(512, WHITE)]
    rgba.putalpha(128)
    assert load_image(rgba).getpixel((0, 0)) == (255, 127, 127)
    assert load_image(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == WHITE
    assert load_image(Image.new("La", (2, 2), (0, 0))).getpixel((0, 0)) == WHITE


def test_a_palette_with_a_transparent_colour_shows_white_there() -> None:
    palette = corners().quantize(4)
    index = palette.getpixel((0, 0))
    loaded = load_image(encoded(palette, "PNG", transparency=index))
    assert loaded.getpixel((0, 0)) == WHITE
    assert loaded.getpixel((31, 0)) == GREEN
    assert load_image(encoded(palette, "GIF")).getpixel((0, 0)) == RED


def test_16_bit_grey_keeps_its_shades() -> None:
    shades = np.repeat((np.arange(256, dtype=np.uint16) * 257)[None], 2, axis=0)
    for image_format in ("PNG", "TIFF"):
        loaded = load_image(encoded(Image.fromarray(shades), image_format))
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded)[0], np.repeat(np.arange(256)[:, None], 3, axis=1))


def test_float_grey_is_scaled_and_must_be_finite() -> None:
    unit = Image.fromarray(np.linspace(0, 1, 4, dtype=np.float32)[None])
    assert [pixel[0] for pixel in load_image(encoded(unit, "TIFF")).getdata()] == [0, 85, 170, 255]
    with pytest.raises(ImageError, match="not finite"):
        load_image(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))


def test_cmyk_grey_and_black_and_white_become_rgb() -> None:
    loaded = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(loaded.getpixel((8, 8))) - RED).max() < 8
    assert load_image(encoded(Image.new("L", (4, 4), 99), "PNG")).getpixel((0, 0)) == (99, 99, 99)
    assert load_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == WHITE


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for image_format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert load_image(data).getpixel((0, 0)) == RED


def test_a_path_bytes_and_a_stream_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "ünï .png"
    file.write_bytes(encoded(corners(), "PNG"))
    stream = BytesIO(file.read_bytes())
    stream.seek(7)
    assert all(same(load_image(source), corners()) for source in (file, str(file), file.read_bytes(), stream))


def test_the_media_type_is_that_of_the_content_not_of_the_suffix() -> None:
    assert decode_image(encoded(corners(), "WEBP"), "photo.jpg")[1] == "image/webp"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "GIF"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_truncated_image_is_an_error_and_never_half_a_picture(image_format: str, kept: float) -> None:
    data = encoded(noise((64, 64)), image_format)
    with pytest.raises(ImageError) as caught:
        load_image(data[: int(len(data) * kept)])
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_a_truncated_jpeg_is_named_with_its_reason(tmp_path: Path) -> None:
    data = encoded(noise((64, 64)), "JPEG")
    (tmp_path / "photo.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"photo\.jpg: is truncated") as caught:
        load_image(tmp_path / "photo.jpg")
    assert caught.value.source == str(tmp_path / "photo.jpg")
    assert caught.value.reason.startswith("is truncated")


def damaged_avif(part: str) -> bytes:
    """Return an AVIF at which Pillow's decoder raises a RuntimeError: at opening (header) or at loading (pixels)."""
    data = encoded(noise((64, 64)), "AVIF")
    pixels = data.index(b"mdat") + len(b"mdat")
    return {"header": data.replace(b"iloc", b"free"), "pixels": data[:pixels].ljust(len(data), b"\0")}[part]


@pytest.mark.parametrize("part", ["header", "pixels"])
def test_an_avif_at_which_its_decoder_raises_an_error_of_its_own_is_an_image_error(tmp_path: Path, part: str) -> None:
    (tmp_path / "photo.avif").write_bytes(damaged_avif(part))
    with pytest.raises(RuntimeError), Image.open(tmp_path / "photo.avif") as image:
        image.load()
    with pytest.raises(ImageError, match=r"photo\.avif: cannot be decoded \(Failed to decode"):
        load_image(tmp_path / "photo.avif")


def test_a_pil_image_whose_pixels_cannot_be_decoded_is_an_image_error() -> None:
    opened = Image.open(BytesIO(damaged_avif("pixels")))
    assert opened.size == (64, 64)
    with pytest.raises(ImageError, match=r"PIL image: cannot be decoded \(Failed to decode"):
        load_image(opened)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "is empty"),
        ("page.jpg", b"<!doctype html><title>404</title>", "is not an image"),
        ("text.png", b"hello", "is not an image"),
        ("nul.jpg", bytes(1000), "is not an image"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        load_image(tmp_path / name)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("x.png", "is a folder"),
        ("missing.png", "does not exist"),
        ("dangling.png", "is a link to a file that does not exist"),
        ("pipe.png", "is not a regular file"),
        ("nul\0.png", "cannot be read"),
    ):
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="is not a regular file"):
        load_image("/dev/zero")
    with pytest.raises(ImageError, match="does not exist"):
        load_image("https://example.com/photo.jpg")


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(images.MAX_IMAGE_BYTES + 1)
    with pytest.raises(ImageError, match=str(images.MAX_IMAGE_BYTES)):
        read_image_bytes(tmp_path / "huge.jpg")


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header announces the size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = encoded(Image.new("1", (1, 1)), "PNG")
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="is too large"):
        load_image(png_that_claims(100_000, 100_000))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match=str(images.MAX_IMAGE_PIXELS)):
        load_image(png_that_claims(10_000, 9_000))
    with pytest.raises(ImageError, match="is truncated"):
        load_image(png_that_claims(9_000, 9_000))


def test_a_name_with_a_newline_stays_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "two\nlines.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "two\nlines.jpg")
    assert "\n" not in str(caught.value)


def test_images_are_found_by_suffix_sorted_and_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "a.png", "notes.txt", "b/c.WebP", "b/d.jpeg.part"):
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "folder.png").mkdir()
    found = find_images([tmp_path, tmp_path / "a.png", tmp_path / "notes.txt"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.png", "b/c.WebP", "notes.txt", "z.JPG"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="nowhere does not exist"):
        find_images([tmp_path / "nowhere"])


def test_metadata_rows_keep_their_columns_and_get_a_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    row = {"file_name": "sub/a.png", "text": "ein Fuß", "licence": "CC0"}
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\n")
    assert read_image_folder_metadata(tmp_path) == [{**row, "path": tmp_path / "sub" / "a.png"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"', "is not JSON"),
        ('["a.png"]', "is a JSON list"),
        ('{"text": "no name"}', "has no file_name"),
        ('{"file_name": 3}', "has no file_name"),
        ('{"file_name": "b.png", "text": ""}', r"names 'b\.png', which is not in"),
        ('{"file_name": "a\\u0000.png"}', "which is not in"),
        ('{"file_name": "a.png", "score": NaN}', "NaN is no JSON value"),
        ('{"file_name": "a.png", "text": ["x"]}', "has a text that is a JSON list"),
    ],
)
def test_a_malformed_metadata_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "good"}\n\n' + line + "\n")
    with pytest.raises(CocoaError, match=r"metadata\.jsonl:3 .*" + message):
        read_image_folder_metadata(tmp_path)


def test_metadata_that_are_missing_or_no_text_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match=r"has no metadata\.jsonl"):
        read_image_folder_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CocoaError, match="cannot be read"):
        read_image_folder_metadata(tmp_path)
