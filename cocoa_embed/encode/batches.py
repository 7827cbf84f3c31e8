"""How many visual tokens an image costs, and batches of images bounded by them. No pixel is decoded for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CountTokens: TypeAlias = Callable[[int, int], int]
"""Takes an image's width and height in pixels; raises a ``ValueError`` for a size that the model refuses."""

BYTES_PER_PIXEL = 3


@runtime_checkable
class PatchCounter(Protocol):
    """An image processor that tells how many patches it makes of an image, as those of Qwen's and GLM's models do."""

    merge_size: int
    """Patches a side that become one visual token."""

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any]) -> int:
        """Return how many patches an image of this size becomes."""


class ImageCost(NamedTuple):
    """What a batch has to know of an image, in the order in which images are sorted."""

    tokens: int
    width: int
    height: int

    @property
    def decoded_bytes(self) -> int:
        """The bytes of its pixels as RGB."""
        return BYTES_PER_PIXEL * self.width * self.height


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold. A single image that exceeds them is a batch by itself."""

    images: int
    tokens: int
    """The most visual tokens of an image, times the images: shorter ones are padded to the longest."""
    decoded_bytes: int


def token_counter(model: SentenceTransformer) -> CountTokens:
    """Return what tells the visual tokens of an image: exact where the processor does, else the same for every image.

    Models whose images all take as many tokens, as CLIP's and SigLIP's do, lose nothing by that.
    """
    counter = patch_counter(model)
    if counter is None:
        return lambda width, height: 1

    def count(width: int, height: int) -> int:
        return counter.get_number_of_image_patches(height, width, {}) // counter.merge_size**2

    return count


def patch_counter(model: SentenceTransformer) -> PatchCounter | None:
    """Return the model's image processor if it counts patches."""
    try:
        processor = model.processor
        image_processor = processor if isinstance(processor, PatchCounter) else processor.image_processor
    except AttributeError:  # an input module without a processor, or a processor without images
        return None
    return image_processor if isinstance(image_processor, PatchCounter) else None


def plan_batches(costs: Sequence[ImageCost], limits: BatchLimits) -> list[list[int]]:
    """Cut a window of images into batches of similar sizes, the costliest first.

    Images of one size stand together: image processors resize those at once.

    :param costs: What each image costs.
    :return: For each batch the places of its images in ``costs``; every place is in exactly one batch.
    """
    batches: list[list[int]] = []
    held = 0
    for place in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        held += costs[place].decoded_bytes
        if batches and _fits(costs, batches[-1], held, limits):
            batches[-1].append(place)
        else:
            batches.append([place])
            held = costs[place].decoded_bytes
    return batches


def _fits(costs: Sequence[ImageCost], batch: Sequence[int], decoded_bytes: int, limits: BatchLimits) -> bool:
    """Tell whether one more image, no larger than the first, fits into a batch, which would hold so many bytes."""
    images = len(batch) + 1
    padded = images * costs[batch[0]].tokens
    return images <= limits.images and padded <= limits.tokens and decoded_bytes <= limits.decoded_bytes
