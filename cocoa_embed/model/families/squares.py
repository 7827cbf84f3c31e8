"""Families in which each image is one square, which the vision encoder itself cuts into patches."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from cocoa_embed.model.families.family import Family, PatchGeometry
from cocoa_embed.model.host_tensor import on_host


class Squares(Family):
    """A raw patch is the pixels of one visual token: a square of the encoder's own patches."""

    adapted = frozenset({"q_proj", "k_proj", "v_proj", "fc1", "fc2"})

    tokens_key: ClassVar[str]
    """The processor's attribute with the number of an image's visual tokens."""

    @classmethod
    @abstractmethod
    def side(cls, processor: ProcessorMixin) -> int:
        """Return the side of an image, in pixels."""

    @classmethod
    @abstractmethod
    def set_side(cls, processor: ProcessorMixin, side: int) -> None:
        """Have the image processor make every image one square of this side, in place."""

    @classmethod
    def most_visual_tokens(cls, processor: ProcessorMixin) -> int:
        """Return the number that every image has."""
        return int(getattr(processor, cls.tokens_key))

    @classmethod
    def visual_tokens(cls, processor: ProcessorMixin, width: int, height: int) -> int:
        """Return the same number for any size."""
        return cls.most_visual_tokens(processor)

    @classmethod
    def most_pixels(cls, processor: ProcessorMixin) -> int:
        """Return the number that every image has."""
        return cls.side(processor) ** 2

    @classmethod
    def image_geometry(cls, processor: ProcessorMixin) -> PatchGeometry:
        """Divide the image's side by its tokens; the encoder does not see the remainder (384 = 9 * 42 + 6)."""
        size = cls.side(processor) // math.isqrt(cls.most_visual_tokens(processor))
        return PatchGeometry(len(processor.image_processor.image_mean), 1, size, 1)

    @classmethod
    def limit_pixels(cls, processor: ProcessorMixin, pixels: int | None) -> None:
        """Make every image one square of as many visual tokens as fit, but no more than the processor makes."""
        size, side = cls.image_geometry(processor).patch_size, cls.side(processor)
        if pixels is not None and (fitting := math.isqrt(pixels) // size) ** 2 < cls.most_visual_tokens(processor):
            side = fitting * size
            setattr(processor, cls.tokens_key, fitting**2)
        cls.set_side(processor, side)

    @classmethod
    def patches(cls, processor: ProcessorMixin, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Cut the processor's own image into one square per visual token."""
        done = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        count, size = math.isqrt(cls.most_visual_tokens(processor)), cls.image_geometry(processor).patch_size
        pixels = done["pixel_values"].flatten(0, -4)[0, :, : count * size, : count * size]
        rows = pixels.unflatten(2, (count, size)).unflatten(1, (count, size)).permute(1, 3, 0, 2, 4)
        return rows.reshape(count**2, -1), torch.tensor([[1, count, count]])

    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the indices in the sequence, for text and image alike: int64 ``[B, L]``."""
        ids = batch["input_ids"]
        return torch.arange(ids.shape[1]).expand(ids.shape)

    def image_inputs(self, grids: Tensor) -> dict[str, Any]:
        """Return the grids only."""
        return {"image_grid_thw": on_host(grids)}

    def images(self, rows: Tensor, grids: Tensor) -> Tensor:
        """Assemble images from rows of ``pixel_values``: ``[images, channels, height, width]``.

        :param grids: The grids of images of one size, on the CPU.
        """
        _, height, width = grids[0].tolist()
        size = self.geometry.patch_size
        blocks = rows.view(-1, height, width, self.geometry.channels, size, size)
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(blocks), -1, height * size, width * size)
