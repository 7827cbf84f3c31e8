import base64
import os
import threading
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from raw_images import corners, encoded, exif, heic, same, stored

from cocoa_embed.errors import ImageError
from cocoa_embed.images import load as images
from cocoa_embed.images.load import image_size, load_image, read_stable_file

CLOSE = 15
"""More than lossy compression changes these pictures by, and far less than turning them does."""

CONTAINERS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIC", "TIFF raw", "TIFF tiff_lzw", "TIFF jpeg")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_turns_the_picture_upright_once(container: str, orientation: int) -> None:
    image_format, _, compression = container.partition(" ")
    if container == "HEIC":
        data = heic(corners(), orientation)
        assert (b"irot" in data or b"imir" in data) == (b"Exif" in data) == (orientation > 1)
    else:
        options = {"compression": compression} if compression else {}
        data = encoded(stored(corners(), orientation), image_format, exif=exif(orientation), **options)
    loaded = load_image(data)
    assert loaded.size == image_size(data, "photo") == corners().size
    assert np.abs(np.subtract(loaded, corners(), dtype=float)).mean() < CLOSE


def test_a_pil_image_is_turned_too_and_left_as_it_was() -> None:
    given = Image.open(BytesIO(encoded(corners(), "PNG", exif=exif(6))))
    assert load_image(given).size == (32, 64)
    assert given.size == (64, 32)
    plain = corners()
    load_image(plain).paste("blue", (0, 0, 64, 32))
    assert same(plain, corners())


def test_a_path_bytes_and_a_stream_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "ünï .png"
    file.write_bytes(encoded(corners(), "PNG"))
    stream = BytesIO(file.read_bytes())
    stream.seek(7)
    assert all(same(load_image(source), corners()) for source in (file, str(file), file.read_bytes(), stream))


def test_a_pil_image_that_cannot_be_used_is_an_image_error() -> None:
    avif = encoded(corners(), "AVIF")
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
def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path, name: str, reason: str) -> None:
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


@pytest.mark.parametrize("content", [b"longer" * 9, b"s", b"same!"])
def test_a_file_that_changes_while_it_is_read_is_read_again_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    file, fstat = tmp_path / "a.png", os.fstat
    file.write_bytes(b"12345")
    changes = [1.5]

    def fstat_and_change(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        if changes:
            file.write_bytes(content)
            os.utime(file, (0, changes.pop()))
        return status

    monkeypatch.setattr(os, "fstat", fstat_and_change)
    assert read_stable_file(file) == content
    changes += range(9)
    with pytest.raises(ImageError, match="changed while it was being read"):
        read_stable_file(file)


@pytest.mark.parametrize(("name", "reason"), [("pipe.png", "is not a regular file"), ("gone.png", "does not exist")])
def test_a_file_that_becomes_a_pipe_or_vanishes_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    regular = os.stat(__file__)
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(os, "stat", lambda path, **options: regular)
    reasons = []

    def read() -> None:
        with pytest.raises(ImageError) as caught:
            read_stable_file(tmp_path / name)
        reasons.append(caught.value.reason)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert reasons == [reason]


def test_a_web_address_is_refused_and_shown_without_secrets() -> None:
    with pytest.raises(ImageError, match=r"^https://example\.com/a\.jpg\?\.\.\.: is a web address; .*load_key"):
        load_image("https://me:secret@example.com/a.jpg?key=secret")


def test_a_missing_file_with_several_spellings_on_disk_is_explained(tmp_path: Path) -> None:
    for name in ("\u00c5\u0301.png", "A\u030a\u0301.png"):  # Ǻ
        (tmp_path / name).touch()
    with pytest.raises(ImageError, match=r"does not exist; .* differ from it and .* rename all but one$"):
        load_image(tmp_path / "\u01fa.png")
