"""Every image of a stage decoded once before training: none can stop it half-way, and their sizes are known."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cocoa_embed.errors import ImageError
from cocoa_embed.train.data.rows import RowImage, load_row_image

ImageSize: TypeAlias = tuple[int, int]
"""Width and height in pixels, as the image stands upright."""

IMAGES_AT_ONCE = 16
"""Images whose sizes come from a worker together."""


class _Sizes(Dataset[tuple[int, ImageSize | str]]):
    """Each image's number, and its size or what is wrong with it."""

    def __init__(self, images: Sequence[RowImage]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, ImageSize | str]:
        try:
            return index, load_row_image(self.images[index]).size
        except ImageError as error:
            return index, error.reason


def check_images(
    images: Iterable[RowImage],
    workers: int = 0,
    *,
    progress: bool = False,
    known: Mapping[RowImage, ImageSize | str] | None = None,
) -> dict[RowImage, ImageSize | str]:
    """Decode each image once, whatever the number of rows that hold it; only its size is kept.

    :param workers: Processes to decode in; 0 is this one.
    :param progress: Show a progress bar on standard error.
    :param known: What an earlier check has found; those images are not decoded again.
    :returns: In the order of ``images``: width and height in pixels with the EXIF orientation applied, or why the image
        cannot be used.
    """
    asked = list(dict.fromkeys(images))
    found = {image: known[image] for image in asked if image in known} if known else {}
    distinct = [image for image in asked if image not in found]
    loader = DataLoader(
        _Sizes(distinct),
        batch_size=IMAGES_AT_ONCE,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own: the run's random numbers do not depend on the check
    )
    with tqdm(total=len(distinct), desc="checking images", unit="image", disable=not progress or not distinct) as bar:
        for batch in loader:
            found.update({distinct[index]: result for index, result in batch})
            bar.update(len(batch))
    return {image: found[image] for image in asked}


def known_sizes(found: Mapping[RowImage, ImageSize | str]) -> dict[RowImage, ImageSize]:
    """Return the sizes of the images that can be used."""
    return {image: result for image, result in found.items() if not isinstance(result, str)}
