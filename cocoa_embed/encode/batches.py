"""Cut images into batches of similar sizes, bounded by images, visual tokens and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from cocoa_embed.errors import UsageError
from cocoa_embed.model.visual_tokens import PatchCounter, visual_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CountTokens: TypeAlias = Callable[[int, int], int]
"""Takes an image's width and height in pixels; raises a ``ValueError`` for a size that the model refuses."""


class ImageCost(NamedTuple):
    """The cost of an image in a batch; images are sorted by these fields in this order."""

    tokens: int
    width: int
    height: int

    @property
    def decoded_bytes(self) -> int:
        """The bytes of the image as RGB."""
        return 3 * self.width * self.height


class BatchLimits(NamedTuple):
    """The limits of a batch. An image that exceeds one of them is a batch of one."""

    images: int
    tokens: int
    """Visual tokens of the largest image, times the number of images: shorter sequences are padded to the longest."""
    decoded_bytes: int


def token_counter(model: SentenceTransformer) -> CountTokens:
    """Return a function that counts an image's visual tokens.

    It is exact if the model's image processor counts patches, or its family is supported. Other models, such as CLIP
    and SigLIP, turn every image into the same number of tokens: for them the function returns 1.
    """
    with suppress(AttributeError, UsageError):  # no processor, or one without images, or of no supported model
        processor: Any = model.processor
        counter = model.processor if isinstance(model.processor, PatchCounter) else processor.image_processor
        if isinstance(counter, PatchCounter):
            return partial(visual_tokens, counter)
        from cocoa_embed.model.families.registry import family_of_images

        return partial(family_of_images(processor).visual_tokens, processor)
    return lambda width, height: 1


def plan_batches(costs: Sequence[ImageCost], limits: BatchLimits) -> list[list[int]]:
    """Sort images by cost, the largest first, and cut them into batches.

    Images of one size become neighbours: image processors resize those together.

    :param costs: The cost of each image.
    :return: The indices into ``costs`` of each batch's images; every index is in exactly one batch.
    """
    batches: list[list[int]] = []
    batch_bytes = most_images = 0
    for index in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        cost = costs[index]
        batch_bytes += cost.decoded_bytes
        if batches and len(batches[-1]) < most_images and batch_bytes <= limits.decoded_bytes:
            batches[-1].append(index)
        else:
            batches.append([index])
            batch_bytes = cost.decoded_bytes
            # The first image of a batch is its largest.
            most_images = min(limits.images, limits.tokens // max(cost.tokens, 1))
    return batches
