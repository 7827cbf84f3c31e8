import base64
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from raw_images import encoded, exif, png_chunk, png_file, stored

from cocoa_embed.errors import ImageError
from cocoa_embed.images import load as images
from cocoa_embed.images.load import decode_image, load_image, read_image_bytes, read_stable_file

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


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.mode == other.mode and image.size == other.size and image.tobytes() == other.tobytes()


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_lossy_containers_give_nearly_the_same_pixels(image_format: str) -> None:
    loaded = load_image(encoded(corners(), image_format, quality=95))
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded, dtype=float) - np.asarray(corners(), dtype=float)).mean() < CLOSE


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_turns_the_picture_upright(image_format: str, orientation: int) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(stored(corners(), orientation), image_format, exif=exif(orientation), **options)
    loaded = load_image(data)
    assert loaded.size == corners().size
    difference = np.abs(np.asarray(loaded, dtype=float) - np.asarray(corners(), dtype=float))
    assert difference.mean() < CLOSE


def test_a_pil_image_is_turned_too_and_left_as_it_was() -> None:
    given = Image.open(BytesIO(encoded(corners(), "PNG", exif=exif(6))))
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
    (tmp_path / "itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("x.png", "is a folder"),
        ("missing.png", "does not exist"),
        ("dangling.png", "is a link to a file that does not exist"),
        ("pipe.png", "is not a regular file"),
        ("itself.png", "is a link that leads back to itself"),
        ("n" * 300, "cannot be read (File name too long)"),
        ("nul\0.png", "cannot be read"),
    ):
        with pytest.raises(ImageError, match=re.escape(reason)):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="is not a regular file"):
        load_image("/dev/zero")


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(images.MAX_IMAGE_BYTES + 1)
    with pytest.raises(ImageError, match=str(images.MAX_IMAGE_BYTES)):
        read_image_bytes(tmp_path / "huge.jpg")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    def png_that_claims(width: int, height: int) -> bytes:
        return png_file(width, height, 1, 0, png_chunk(b"IDAT", b""))

    with pytest.raises(ImageError, match="is too large"):
        load_image(png_that_claims(100_000, 100_000))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match=str(images.MAX_IMAGE_PIXELS)):
        load_image(png_that_claims(10_000, 9_000))
    with pytest.raises(ImageError, match="is truncated"):
        load_image(png_that_claims(9_000, 9_000))
    large = Image.new("1", (10_000, 9_000))
    with pytest.raises(ImageError, match=r"^PIL image: is too large: 10000 x 9000"):
        load_image(large)


def test_a_name_with_a_newline_stays_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "two\nlines.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "two\nlines.jpg")
    assert "\n" not in str(caught.value)


def test_an_empty_pil_image_is_refused() -> None:
    with pytest.raises(ImageError, match="has no pixels"):
        load_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("mime", ["image/png", "IMAGE/PNG;charset=x", "", "text/html"])
def test_a_data_uri_holds_an_image_in_base64_or_percent_encoded(mime: str) -> None:
    data = encoded(corners(), "PNG")
    text = base64.b64encode(data).decode()
    uris = [
        f"data:{mime};base64,{text}",
        f"DATA:{mime};BASE64,{text}",
        f"data:{mime};base64,{text.rstrip('=')}",
        f"data:{mime};base64,{quote(text, safe='')}",
        f"data:{mime};base64," + "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        f"data:{mime},{quote(data)}",
    ]
    assert all(same(load_image(uri), corners()) for uri in uris)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:", "has no comma"),
        ("data:image/png;base64", "has no comma"),
        ("data:,", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,SECRET*SECRET", "is not valid base64"),
        ("data:image/png;base64,SECRE", "is not valid base64"),
        ("data:image/png;base64,SECRET\udcff", "is not valid base64"),
        ("data:image/png,SECRET", "is not an image"),
        ("data:image/png;base64,U0VDUkVU", "is not an image"),
    ],
)
def test_a_bad_data_uri_is_named_without_what_it_holds(uri: str, reason: str) -> None:
    with pytest.raises(ImageError, match=f"^data: URI of {len(uri)} characters: {reason}") as caught:
        load_image(uri)
    assert "SECRE" not in str(caught.value)


def test_a_data_uri_of_too_many_bytes_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(images, "unquote_to_bytes", None)
    for uri in ("data:;base64," + "A" * 1400, "data:," + "%00" * 1001):
        with pytest.raises(ImageError, match=r"is too large: .* the limit is 1000"):
            load_image(uri)


def test_a_file_may_be_named_as_an_address_is(tmp_path: Path) -> None:
    for name in ("data:,x.png", "http:.png"):
        (tmp_path / name).write_bytes(encoded(corners(), "PNG"))
        assert same(load_image(tmp_path / name), corners())


@pytest.mark.parametrize("address", ["http://example.com/a.jpg", "HTTPS://me:secret@example.com/a.jpg?key=secret"])
def test_a_web_address_without_a_fetcher_is_refused_with_the_way_to_allow_it(address: str) -> None:
    with pytest.raises(ImageError, match=r"is a web address; give load_image a cocoa_embed\.remote\.Fetcher") as caught:
        load_image(address)
    assert "secret" not in str(caught.value)
    assert "example.com/a.jpg" in str(caught.value)


def test_a_file_comes_with_its_time_and_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    os.utime(tmp_path / "a.png", ns=(1, 1_700_000_000_123_456_789))
    assert read_stable_file(tmp_path / "a.png") == (b"12345", pytest.approx(1_700_000_000.123456789), 5)


def change_while_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None]) -> None:
    """Call ``change`` with the number of the attempt between looking at a file and looking at it again."""
    fstat, calls = os.fstat, []

    def fstat_and_change(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        calls.append(descriptor)
        if len(calls) % 2:
            change(len(calls) // 2 + 1)
        return status

    monkeypatch.setattr(os, "fstat", fstat_and_change)


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"old")

    def change(attempt: int) -> None:
        if attempt == 1:
            file.write_bytes(b"new and longer")

    change_while_read(monkeypatch, change)
    assert read_stable_file(file).data == b"new and longer"


@pytest.mark.parametrize("content", [b"longer" * 9, b"s", b"same!"])
def test_a_file_that_changes_whenever_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"12345")

    def change(attempt: int) -> None:
        file.write_bytes(content * attempt)
        os.utime(file, (attempt, attempt))

    change_while_read(monkeypatch, change)
    with pytest.raises(ImageError, match="changed while it was being read"):
        read_stable_file(file)


def test_a_file_that_vanishes_or_becomes_a_pipe_after_it_was_looked_at_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regular, stat = os.stat(__file__), os.stat
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(os, "stat", lambda path, **options: regular if str(path).endswith(".png") else stat(path))
    results = []

    def read(name: str) -> None:
        with pytest.raises(ImageError) as caught:
            read_image_bytes(tmp_path / name)
        results.append(caught.value.reason)

    for name in ("pipe.png", "gone.png"):
        thread = threading.Thread(target=read, args=(name,), daemon=True)
        thread.start()
        thread.join(5)
    assert results == ["is not a regular file", "does not exist"]


def test_a_device_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "read_once", None)
    with pytest.raises(ImageError, match="is not a regular file"):
        read_image_bytes("/dev/zero")


def test_nothing_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(corners(), "PNG"))
    (tmp_path / "bad.png").write_bytes(b"bad")
    (tmp_path / "folder.png").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for name in ("good.png", "bad.png", "folder.png", "gone.png"):
            with suppress(ImageError):
                load_image(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_load_images_together() -> None:
    data = [encoded(noise((64, 64)), image_format) for image_format in ("PNG", "WEBP", "TIFF", "JPEG")] * 20
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(load_image, data))
    assert all(same(image, load_image(content)) for image, content in zip(loaded, data, strict=True))
