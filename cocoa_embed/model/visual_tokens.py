"""Count the visual tokens of an image from its size, without decoding it."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PatchCounter(Protocol):
    """An image processor that counts the patches of an image, such as those of Qwen's and GLM's models."""

    merge_size: int
    """The number of patches along each side of a visual token."""

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any]) -> int:
        """Return how many patches an image of this size becomes."""
        ...


def visual_tokens(image_processor: PatchCounter, width: int, height: int) -> int:
    """Return how many visual tokens an image of ``width`` x ``height`` pixels becomes.

    :raises ValueError: If the processor refuses the size.
    """
    return int(image_processor.get_number_of_image_patches(height, width, {})) // image_processor.merge_size**2
