"""Decodes every image of a stage once before training, so that a broken one cannot end a run half-way."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cocoa_embed.data.rows import ItemImage
from cocoa_embed.errors import ImageError
from cocoa_embed.train.data.rows import load_row_image

ImageSize: TypeAlias = tuple[int, int]
"""Width and height in pixels, with the EXIF orientation applied."""

CheckedImages: TypeAlias = dict[ItemImage, ImageSize | str]
"""The size of each image, or the reason why it cannot be used."""

IMAGES_AT_ONCE = 16
"""Images that a worker decodes before it returns their sizes."""


def _sizes(images: Sequence[ItemImage]) -> list[ImageSize | str]:
    found: list[ImageSize | str] = []
    for image in images:
        try:
            found.append(load_row_image(image).size)
        except ImageError as error:
            found.append(error.reason)
    return found


def check_images(images: Iterable[ItemImage], workers: int = 0, known: CheckedImages | None = None) -> CheckedImages:
    """Decode each distinct image once, under a progress bar on standard error; only its size is kept.

    :param workers: Processes to decode in; 0 is this one.
    :param known: The results of earlier checks, which are not repeated; new results are added.
    :returns: The results in the order of ``images``.
    """
    distinct = list(dict.fromkeys(images))
    known = {} if known is None else known
    new: Any = [image for image in distinct if image not in known]
    loader = DataLoader(
        new,
        batch_size=IMAGES_AT_ONCE,
        num_workers=workers,
        collate_fn=_sizes,
        generator=torch.Generator(),  # not the run's, whose random numbers do not depend on the check
    )
    sizes = tqdm(chain.from_iterable(loader), "checking images", len(new), unit="image", disable=not new)
    known.update(zip(new, sizes, strict=True))
    return {image: known[image] for image in distinct}
