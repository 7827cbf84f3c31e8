"""Decode and preprocess a batch of images; find the ones that are broken or that the processor refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from cocoa_embed.encode.document_model import Features
from cocoa_embed.encode.jobs import REFUSALS, UNKNOWN_MIME, ImageJob
from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import decode_image, load_image
from cocoa_embed.images.to_rgb import draw_thumbnail

Preprocess: TypeAlias = Callable[[Sequence[Image.Image]], Features]


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Images that go through the model together."""

    jobs: Sequence[ImageJob]
    features: Features

    @property
    def tokens(self) -> int:
        """Visual tokens, including those that pad shorter images to the longest."""
        return len(self.jobs) * max(job.cost.tokens for job in self.jobs)


def prepare(jobs: Sequence[ImageJob], preprocess: Preprocess, thumbnail_size: int | None) -> list[PreparedBatch]:
    """Decode and preprocess measured images, and finish the jobs whose images cannot be used.

    :param preprocess: Turns images into the model's inputs.
    :param thumbnail_size: The longest side of thumbnails, in pixels; None for no thumbnails.
    :return: One batch; several where the processor refuses the whole but takes parts; none if no image can be used.
    """
    decoded = []
    for job in jobs:
        try:
            decoded.append((job, decode(job, thumbnail_size)))
        except ImageError as error:
            job.finish(error)
    return list(_preprocess(decoded, preprocess))


def decode(job: ImageJob, thumbnail_size: int | None) -> Image.Image:
    """Return a job's image as upright RGB; set the job's media type, thumbnail and exact size.

    :raises ImageError: If the image is broken.
    """
    source = job.source
    if isinstance(source, Image.Image):
        image, mime = load_image(source), Image.MIME.get(source.format or "", UNKNOWN_MIME)
    else:
        assert isinstance(source, bytes), "a job is measured before it is decoded"
        image, mime = decode_image(source, job.name)
    job.cost = job.cost._replace(width=image.width, height=image.height)
    job.mime = mime
    if thumbnail_size is not None:
        job.thumbnail = draw_thumbnail(image, thumbnail_size)
    return image


def _preprocess(decoded: Sequence[tuple[ImageJob, Image.Image]], preprocess: Preprocess) -> Iterator[PreparedBatch]:
    """Preprocess images together; where the processor refuses them, in halves, down to the ones that it refuses."""
    if not decoded:
        return
    try:
        features = preprocess([image for _, image in decoded])
    except REFUSALS as error:
        if len(decoded) == 1:
            decoded[0][0].refuse(error)
            return
    else:
        yield PreparedBatch([job for job, _ in decoded], features)
        return
    middle = len(decoded) // 2
    yield from _preprocess(decoded[:middle], preprocess)
    yield from _preprocess(decoded[middle:], preprocess)
