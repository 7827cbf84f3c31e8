import base64
import os
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from raw_images import encoded, exif, stored

from cocoa_embed.errors import ImageError
from cocoa_embed.images import load as images
from cocoa_embed.images.load import load_image, read_stable_file

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


def test_a_path_bytes_and_a_stream_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "ünï .png"
    file.write_bytes(encoded(corners(), "PNG"))
    stream = BytesIO(file.read_bytes())
    stream.seek(7)
    assert all(same(load_image(source), corners()) for source in (file, str(file), file.read_bytes(), stream))


def test_a_pil_image_that_cannot_be_used_is_an_image_error() -> None:
    avif = encoded(noise((64, 64)), "AVIF")
    broken = avif[: avif.index(b"mdat") + 4].ljust(len(avif), b"\0")
    for image, reason in (
        (Image.open(BytesIO(broken)), r"cannot be decoded \(Failed to decode"),
        (Image.new("RGB", (0, 3)), "has no pixels"),
        (Image.new("1", (10_000, 9_000)), f"is too large: 10000 x 9000 .* {images.MAX_IMAGE_PIXELS}"),
    ):
        with pytest.raises(ImageError, match=f"^PIL image: {reason}"):
            load_image(image)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.png", "is a folder"),
        ("missing.png", "does not exist"),
        ("n" * 300, r"cannot be read \(File name too long\)"),
        ("nul\0.png", "cannot be read"),
    ],
)
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "x.png").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match=reason):
        load_image(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before, "nothing stays open"


def test_a_data_uri_holds_an_image_in_base64_or_percent_encoded() -> None:
    data = encoded(corners(), "PNG")
    text = base64.b64encode(data).decode()
    uris = [
        f"data:image/png;base64,{text}",
        f"DATA:;BASE64,{text}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{quote(text, safe='')}",
        "data:image/png;base64," + "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        f"data:image/png,{quote(data)}",
    ]
    assert all(same(load_image(uri), corners()) for uri in uris)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:", "has no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,SECRET*SECRET", "is not valid base64"),
        ("data:image/png;base64,SECRE", "is not valid base64"),
        ("data:image/png;base64,U0VDUkVU", "is not an image"),
    ],
)
def test_an_error_of_a_data_uri_does_not_show_its_content(uri: str, reason: str) -> None:
    with pytest.raises(ImageError, match=f"^data: URI of {len(uri)} characters: {reason}") as caught:
        load_image(uri)
    assert "SECRE" not in str(caught.value)


def test_a_data_uri_of_too_many_bytes_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(images, "unquote_to_bytes", None)
    for uri in ("data:;base64," + "A" * 1400, "data:," + "%00" * 1001):
        with pytest.raises(ImageError, match=r"is too large: .* the limit is 1000"):
            load_image(uri)


def test_a_file_is_read_with_its_mtime_and_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    os.utime(tmp_path / "a.png", ns=(1, 1_700_000_000_123_456_789))
    assert read_stable_file(tmp_path / "a.png") == (b"12345", pytest.approx(1_700_000_000.123456789), 5)


def change_while_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None]) -> None:
    """Call ``change`` with the number of the attempt while a file is read."""
    fstat, calls = os.fstat, []

    def fstat_and_change(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        calls.append(descriptor)
        if len(calls) % 2:
            change(len(calls) // 2 + 1)
        return status

    monkeypatch.setattr(os, "fstat", fstat_and_change)


@pytest.mark.parametrize("content", [b"longer" * 9, b"s", b"same!"])
def test_a_file_that_changes_while_it_is_read_is_read_again_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"12345")
    last_change = 1

    def change(attempt: int) -> None:
        if attempt <= last_change:
            file.write_bytes(content * attempt)
            os.utime(file, (attempt, attempt))

    change_while_read(monkeypatch, change)
    assert read_stable_file(file).data == content
    last_change = 99
    with pytest.raises(ImageError, match="changed while it was being read"):
        read_stable_file(file)


def test_a_file_that_vanishes_or_becomes_a_pipe_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regular, stat = os.stat(__file__), os.stat
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(os, "stat", lambda path, **options: regular if str(path).endswith(".png") else stat(path))
    results = []

    def read(name: str) -> None:
        with pytest.raises(ImageError) as caught:
            read_stable_file(tmp_path / name)
        results.append(caught.value.reason)

    for name in ("pipe.png", "gone.png"):
        thread = threading.Thread(target=read, args=(name,), daemon=True)
        thread.start()
        thread.join(5)
    assert results == ["is not a regular file", "does not exist"]


def test_a_web_address_is_refused_without_a_fetcher_and_shown_without_secrets() -> None:
    with pytest.raises(ImageError, match=r"^https://example\.com/a\.jpg\?\.\.\.: is a web address; .*Fetcher"):
        load_image("https://me:secret@example.com/a.jpg?key=secret")
