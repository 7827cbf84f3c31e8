"""Jobs are measured and decoded."""

from io import BytesIO
from pathlib import Path

import pytest
from fake_model import colour_image
from PIL import Image
from raw_images import encoded, exif

from cocoa_embed.encode.jobs import ImageJob, StreamSource, decode, measure
from cocoa_embed.errors import ImageError
from cocoa_embed.images.to_rgb import draw_thumbnail


def measured(source: StreamSource) -> ImageJob:
    job = ImageJob("key", "a picture", source)
    measure(job, lambda width, height: 1)
    return job


@pytest.mark.parametrize("kind", ["bytes", "str", "path", "opened", "in memory"])
def test_every_source_is_measured_and_decoded_and_a_file_is_read_once(kind: str, tmp_path: Path) -> None:
    path, image = tmp_path / "red.png", colour_image("red", (24, 16))
    image.save(path)
    sources = {"bytes": path.read_bytes(), "str": str(path), "path": path, "opened": Image.open(path)}
    job = measured(sources.get(kind, image))
    assert job.cost == (1, 24, 16)
    path.rename(tmp_path / "gone") if kind in ("str", "path") else None
    assert decode(job, None).size == (24, 16)
    mime = "application/octet-stream" if kind == "in memory" else "image/png"
    assert (job.mime, job.thumbnail, job.outcome) == (mime, None, None)


def test_sizes_and_thumbnails_are_upright() -> None:
    job = measured(encoded(colour_image("red", (30, 10)), "JPEG", exif=exif(6)))
    assert job.cost[1:] == (10, 30)
    assert decode(job, 15).size == job.cost[1:] == (10, 30)
    thumbnail = Image.open(BytesIO(job.thumbnail or b""))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (5, 15))


def test_a_thumbnail_does_not_enlarge_its_image() -> None:
    assert Image.open(BytesIO(draw_thumbnail(colour_image("red", (24, 16)), 320))).size == (24, 16)


def test_a_size_that_the_model_refuses_finishes_with_an_error_and_releases_the_image() -> None:
    def refuse(width: int, height: int) -> int:
        raise ValueError("too\nlong")

    job = ImageJob("key", "a picture", colour_image("red"))
    measure(job, refuse)
    assert isinstance(job.outcome, ImageError)
    assert str(job.outcome) == "a picture: cannot be embedded (too long)"
    assert (job.source, job.bytes_held) == (None, 0)
