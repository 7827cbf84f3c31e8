"""Turn image files into the patches of a batch: one image at a time, as bytes until the model runs."""

import ctypes
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import ProcessorMixin

from cocoa_embed.data.rows import ItemImage
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.train.data.rows import load_row_image

IMAGES_A_TRIM = 32
"""The number of images after which freed memory is returned to the system."""


def image_patches(images: Sequence[ItemImage], processor: ProcessorMixin) -> tuple[Tensor, Tensor]:
    """Load images one after the other into the raw patches of an image processor, before it scales their values.

    :param processor: The processor of a supported backbone.
    :returns: Patches, uint8 ``[patches, channels * patch_size ** 2]``, in memory that a worker shares with its trainer;
        and ``image_grid_thw``, int64 ``[images, 3]``.
    :raises ImageError: If an image cannot be used.
    """
    family = family_of_images(processor)
    geometry = family.image_geometry(processor)
    grids, filled, area = [], 0, geometry.patch_size**2
    # The system allocates memory only when it is written, so reserving room for the largest images costs nothing.
    room = len(images) * family.most_pixels(processor) // area
    patches = _empty_bytes(room, geometry.channels * area)

    for number, image in enumerate(images, 1):
        rows, grid = family.patches(processor, load_row_image(image))
        grids.append(grid)
        if filled + len(rows) > len(patches):  # very thin images can exceed the pixel limit
            larger = _empty_bytes(2 * (filled + len(rows)), patches.shape[1])
            larger[:filled] = patches[:filled]
            patches = larger
        patches[filled : filled + len(rows)] = rows
        filled += len(rows)
        if number % IMAGES_A_TRIM == 0:
            trim_memory()
    return patches[:filled], torch.cat(grids)


def normalised(patches: Tensor, processor: ProcessorMixin) -> Tensor:
    """Return the pixel values of patches, as the image processor scales them, on the patches' device.

    :param patches: From ``image_patches``.
    :returns: float32 ``[patches, patch_width]``.
    """
    geometry, image_processor = family_of_images(processor).image_geometry(processor), processor.image_processor
    images = patches.unflatten(1, (-1, geometry.patch_size, geometry.patch_size))
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    pixels = image_processor.rescale_and_normalize(images, True, image_processor.rescale_factor, True, mean, std)
    return pixels[:, :, None].expand(-1, -1, geometry.temporal_patch_size, -1, -1).flatten(1)  # type: ignore[no-any-return]


def patch_digests(patches: Tensor, grids: Tensor, image_processor: Any) -> Tensor:  # noqa: ANN401
    """Return a digest of each image as the vision encoder sees it (patches, grid, scale), int64 ``[images, 2]``.

    :param patches: From ``image_patches``, with its ``image_grid_thw``.
    """
    scale = [image_processor.rescale_factor, *image_processor.image_mean, *image_processor.image_std]
    digests = []
    for own, grid in zip(patches.split(grids.prod(dim=1).tolist()), grids.tolist(), strict=True):
        digest = hashlib.blake2b(own.numpy().data, digest_size=16)
        digest.update(repr((grid, scale)).encode())
        digests.append(np.frombuffer(digest.digest(), np.int64))
    return torch.from_numpy(np.stack(digests))


def trim_memory() -> None:
    """Return freed memory to the system: glibc keeps that of decoded images, two to three times a batch's bytes."""
    with suppress(OSError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _empty_bytes(rows: int, width: int) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(rows, width, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(rows * width, device="cpu")
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(rows, width)
