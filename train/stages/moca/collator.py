"""What MoCa masks, and what replaces masked patches."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from cocoa_embed.data.rows import Row
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.joint.collator import JointCollator
from cocoa_embed.train.stages.masking import draw_uniform, share_noise
from cocoa_embed.train.stages.moca.settings import DEFAULTS, MocaSettings
from cocoa_embed.train.stages.rendering import ordinary_tokens


@dataclass(frozen=True)
class MocaCollator(JointCollator):
    """Mask each text token and each visual token by itself, so that a row may have none masked, or all."""

    settings: MocaSettings = DEFAULTS

    def mask_tokens(self, batch: Batch, rows: Sequence[Row], generators: Sequence[Generator]) -> Tensor:
        """Mask tokens of instructions and content alike."""
        return draw_uniform(ordinary_tokens(batch, self.processor), generators) < self.settings.text_mask_ratio

    def mask_images(self, exists: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Mask visual tokens one by one."""
        return draw_uniform(exists, generators) < self.settings.image_mask_ratio

    def fill(
        self, pixel_values: Tensor, masked: Tensor, patches_per_image: Sequence[int], generators: Sequence[Generator]
    ) -> Tensor:
        """Fill all masked patches of a row with one patch of noise."""
        return share_noise(pixel_values, masked, patches_per_image, generators)
