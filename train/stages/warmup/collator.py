"""What stage 1 masks, and what replaces masked patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from cocoa_embed.data.rows import Row
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.joint.collator import JointCollator
from cocoa_embed.train.stages.masking import fill_patches, mask_each, mask_ratio
from cocoa_embed.train.stages.rendering import instruction_tokens, text_tokens
from cocoa_embed.train.stages.warmup.settings import DEFAULTS, WarmupSettings


@dataclass(frozen=True)
class WarmupCollator(JointCollator):
    """Mask at least one text token of a row, instructions less than content, and a ratio of each image's tokens."""

    settings: WarmupSettings = DEFAULTS

    def mask_tokens(self, batch: Batch, rows: Sequence[Row], generators: Sequence[Generator]) -> Tensor:
        """Mask tokens one by one."""
        instructed = instruction_tokens(batch, rows, self.processor)
        ratio = torch.where(instructed, self.settings.instruction_mask_ratio, self.settings.text_mask_ratio)
        return mask_each(text_tokens(batch, self.processor), ratio, generators)

    def mask_images(self, exists: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Mask a ratio of each image."""
        return mask_ratio(exists, self.settings.image_mask_ratio, generators)

    def fill(
        self, pixel_values: Tensor, masked: Tensor, patches_per_image: Sequence[int], generators: Sequence[Generator]
    ) -> Tensor:
        """Fill as ``patch_fill`` says."""
        return fill_patches(pixel_values, masked, self.settings.patch_fill, patches_per_image, generators)
