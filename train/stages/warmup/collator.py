"""Rows to batches of stage 1: text tokens and visual tokens masked, with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator
from transformers import ProcessorMixin

from cocoa_embed.model.backbone import PatchGeometry
from cocoa_embed.train.loop.batch_facts import Batch, Example
from cocoa_embed.train.stages.masking import fill_patches, mask_each, mask_visual_tokens, row_generators
from cocoa_embed.train.stages.rendering import (
    instruction_tokens,
    joined,
    render_items,
    replace_masked,
    row_images,
    text_tokens,
)
from cocoa_embed.train.stages.warmup.settings import DEFAULTS, WarmupSettings


@dataclass(frozen=True)
class WarmupCollator:
    """Put images and texts of a row into one sequence and mask parts of both.

    Adds to ``render_items``: ``masked_tokens`` (bool ``[B, L]``), ``target_ids`` (int64 ``[masked tokens]``),
    ``masked_patches`` (bool ``[patches]``) and ``target_patches`` (float ``[masked patches, patch_width]``).
    """

    processor: ProcessorMixin
    geometry: PatchGeometry
    seed: int
    settings: WarmupSettings = DEFAULTS

    def __call__(self, examples: list[Example]) -> Batch:
        """Collate rows with their draws."""
        generators, rows = row_generators(self.seed, [draw for draw, _ in examples]), [row for _, row in examples]
        batch = render_items(self.processor, [joined(row) for row in rows])
        instructed = instruction_tokens(batch, rows, self.processor)
        ratio = torch.where(instructed, self.settings.instruction_mask_ratio, self.settings.text_mask_ratio)
        masked = mask_each(text_tokens(batch, self.processor), ratio, generators)
        batch = replace_masked(batch, masked, self.processor.tokenizer.mask_token_id)
        if "pixel_values" not in batch:
            no_patches = torch.empty(0, self.geometry.patch_width)
            return {**batch, "masked_patches": torch.empty(0, dtype=torch.bool), "target_patches": no_patches}
        del batch["image_digests"]  # the vision encoder does not see these images
        of_images = [generator for generator, row in zip(generators, rows, strict=True) for _ in row_images(row)]
        return {**batch, **self._mask_patches(batch, of_images)}

    def _mask_patches(self, batch: Batch, generators: Sequence[Generator]) -> Batch:
        per_token = self.geometry.patches_per_token
        patches = batch["image_grid_thw"].prod(dim=1)
        masked = mask_visual_tokens(patches // per_token, self.settings.image_mask_ratio, generators)
        masked = masked.repeat_interleave(per_token)
        pixels = batch["pixel_values"]
        return {
            "pixel_values": fill_patches(pixels, masked, self.settings.patch_fill, patches.tolist(), generators),
            "masked_patches": masked,
            "target_patches": pixels[masked],
        }
