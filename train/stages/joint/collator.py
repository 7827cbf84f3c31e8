"""Collate rows into batches of a joint reconstruction: masked text tokens and visual tokens, with their targets."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.joint.settings import JointSettings
from cocoa_embed.train.stages.masking import row_generators, visual_places
from cocoa_embed.train.stages.rendering import joined, render_items, replace_masked, row_images


@dataclass(frozen=True)
class JointCollator(ABC):
    """Put the images and texts of a row into one sequence and mask parts of both.

    Adds to ``render_items``: ``masked_tokens`` (bool ``[B, L]``), ``target_ids`` (int64 ``[masked tokens]``),
    ``masked_patches`` (bool ``[patches]``) and ``target_patches`` (float ``[masked patches, patch_width]``).
    """

    processor: ProcessorMixin
    seed: int
    settings: JointSettings

    @abstractmethod
    def mask_tokens(self, batch: Batch, rows: Sequence[Row], generators: Sequence[Generator]) -> Tensor:
        """Return which tokens are masked, bool ``[B, L]``; there is a generator for each row."""

    @abstractmethod
    def mask_images(self, exists: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Return which of the visual tokens that ``exists`` marks are masked, bool ``[images, most tokens]``.

        :param generators: One for each image: that of its row.
        """

    @abstractmethod
    def fill(
        self, pixel_values: Tensor, masked: Tensor, patches_per_image: Sequence[int], generators: Sequence[Generator]
    ) -> Tensor:
        """Return a copy of ``pixel_values`` with new values in the ``masked`` patches (bool ``[patches]``)."""

    def __call__(self, examples: list[Example]) -> Batch:
        """Collate rows with their draws."""
        generators, rows = row_generators(self.seed, [draw for draw, _ in examples]), [row for _, row in examples]
        batch = render_items(self.processor, [joined(row) for row in rows])
        masked = self.mask_tokens(batch, rows, generators)
        batch = replace_masked(batch, masked, self.processor.tokenizer.mask_token_id)
        geometry = family_of_images(self.processor).image_geometry(self.processor)
        if "pixel_values" not in batch:
            no_patches = torch.empty(0, geometry.patch_width)
            return {**batch, "masked_patches": torch.empty(0, dtype=torch.bool), "target_patches": no_patches}
        del batch["image_digests"]  # the vision encoder does not see these images
        of_images = [generator for generator, row in zip(generators, rows, strict=True) for _ in row_images(row)]
        return {**batch, **self._mask_patches(batch, geometry.patches_per_token, of_images)}

    def _mask_patches(self, batch: Batch, per_token: int, generators: Sequence[Generator]) -> Batch:
        patches = batch["image_grid_thw"].prod(dim=1)
        exists = visual_places(patches // per_token)
        masked = self.mask_images(exists, generators)[exists].repeat_interleave(per_token)
        pixels = batch["pixel_values"]
        return {
            "pixel_values": self.fill(pixels, masked, patches.tolist(), generators),
            "masked_patches": masked,
            "target_patches": pixels[masked],
        }
