"""Jobs are measured, decoded and preprocessed."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fake_model import colour_image
from PIL import Image
from raw_images import encoded, exif

from cocoa_embed.encode.jobs import ImageJob, StreamSource, measure
from cocoa_embed.encode.prepare import prepare
from cocoa_embed.errors import ImageError
from cocoa_embed.images.to_rgb import draw_thumbnail

SIDEWAYS = encoded(colour_image("red", (30, 10)), "JPEG", exif=exif(6))
"""30 x 10 as stored, 10 x 30 upright."""


def measured(source: StreamSource, name: str = "a picture", tokens: int = 1) -> ImageJob:
    job = ImageJob(name, name, source)
    measure(job, lambda width, height: tokens)
    return job


def sizes(images: Sequence[Image.Image]) -> dict[str, Any]:
    """Stands for a preprocessor."""
    return {"sizes": [image.size for image in images]}


class Refusing:
    """A preprocessor that refuses batches with an image of one of these widths, and batches that are too large."""

    def __init__(self, *widths: int, at_most: int = 99) -> None:
        self.widths = widths
        self.at_most = at_most

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        assert images
        if any(image.width in self.widths for image in images):
            raise ValueError("of this\nwidth")
        if len(images) > self.at_most:
            raise RuntimeError("too many")
        return sizes(images)


@pytest.mark.parametrize("kind", ["bytes", "str", "path", "pil"])
def test_every_source_is_measured_and_decoded_and_a_file_read_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    colour_image("red", (24, 16)).save(path)
    source = {"bytes": path.read_bytes(), "str": str(path), "path": path, "pil": Image.open(path)}[kind]
    job = measured(source)
    assert job.cost == (1, 24, 16)
    path.unlink() if kind in ("str", "path") else None
    (batch,) = prepare([job], sizes, None)
    assert batch.features == {"sizes": [(24, 16)]}
    assert (job.mime, job.thumbnail, job.outcome) == ("image/png", None, None)


def test_sizes_are_upright_before_and_after_decoding_and_thumbnails_too() -> None:
    job = measured(SIDEWAYS)
    assert job.cost[1:] == (10, 30)
    (batch,) = prepare([job], sizes, 15)
    assert batch.features == {"sizes": [(10, 30)]}
    assert job.cost[1:] == (10, 30)
    thumbnail = Image.open(BytesIO(job.thumbnail or b""))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (5, 15))


def test_a_thumbnail_neither_enlarges_nor_changes_its_image() -> None:
    image = colour_image("red", (24, 16))
    assert Image.open(BytesIO(draw_thumbnail(image, 320))).size == (24, 16)
    draw_thumbnail(image, 8)
    assert image.size == (24, 16)


def test_an_image_made_in_memory_has_no_known_media_type() -> None:
    job = measured(colour_image("red"))
    prepare([job], sizes, None)
    assert job.mime == "application/octet-stream"


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"\xff\xd8\xff\xe0 no more", encoded(colour_image("red"), "PNG")[:20]]
)
def test_a_file_without_a_header_finishes_with_an_error_that_names_it(data: bytes) -> None:
    outcome = measured(data).outcome
    assert isinstance(outcome, ImageError)
    assert outcome.source == "a picture"


def test_a_size_that_the_model_refuses_finishes_with_an_error() -> None:
    def refuse(width: int, height: int) -> int:
        raise ValueError("too\nlong")

    job = ImageJob("key", "a picture", colour_image("red"))
    measure(job, refuse)
    assert str(job.outcome) == "a picture: cannot be embedded (too long)"
    assert job.source is None
    assert job.bytes_held == 0


def test_an_image_that_breaks_later_affects_no_other() -> None:
    truncated = encoded(colour_image("blue", (99, 99)), "JPEG")[:-40]
    good, broken = measured(colour_image("red")), measured(truncated)
    (batch,) = prepare([good, broken], sizes, None)
    assert batch.jobs == [good]
    assert isinstance(broken.outcome, ImageError)
    assert "truncated" in broken.outcome.reason
    assert prepare([measured(truncated)], Refusing(), None) == []


@pytest.mark.parametrize("bad", [(), (3,), (0, 7), (1, 2, 3), tuple(range(8))])
def test_the_images_that_the_processor_refuses_are_found_and_the_others_kept(bad: tuple[int, ...]) -> None:
    jobs = [measured(colour_image("red", (10 + number, 10)), str(number)) for number in range(8)]
    batches = prepare(jobs, Refusing(*(10 + number for number in bad)), None)
    assert [number for number, job in enumerate(jobs) if job.outcome] == list(bad)
    assert all(jobs[number].outcome.reason == "cannot be embedded (of this width)" for number in bad)
    assert [job for batch in batches for job in batch.jobs] == [job for job in jobs if not job.outcome]
    for batch in batches:
        assert batch.features == {"sizes": [job.cost[1:] for job in batch.jobs]}


def test_a_batch_that_is_refused_as_a_whole_is_prepared_in_parts() -> None:
    jobs = [measured(colour_image("red"), tokens=number) for number in range(8)]
    batches = prepare(jobs, Refusing(at_most=3), None)
    assert [len(batch.jobs) for batch in batches] == [2, 2, 2, 2]
    assert [batch.tokens for batch in batches] == [2, 6, 10, 14]
