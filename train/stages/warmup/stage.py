"""Stage 1: what it masks, what replaces masked patches, and where a masked token is predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from cocoa_embed.data.rows import Row
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.joint.collator import JointCollator
from cocoa_embed.train.stages.joint.model import JointModel
from cocoa_embed.train.stages.joint.stage import Joint
from cocoa_embed.train.stages.losses import predicting_states
from cocoa_embed.train.stages.masking import fill_patches, mask_each, mask_ratio
from cocoa_embed.train.stages.rendering import instruction_tokens, text_tokens
from cocoa_embed.train.stages.warmup.settings import WarmupSettings


@dataclass(frozen=True)
class WarmupCollator(JointCollator):
    """Mask at least one text token of a row, instructions less than content, and a ratio of each image's tokens."""

    settings: WarmupSettings

    def mask_tokens(self, batch: Batch, rows: Sequence[Row], generators: Sequence[Generator]) -> Tensor:
        """Mask tokens one by one."""
        instructed = instruction_tokens(batch, rows, self.processor)
        ratio = torch.where(instructed, self.settings.instruction_mask_ratio, self.settings.text_mask_ratio)
        return mask_each(text_tokens(batch, self.processor), ratio, generators)

    def mask_images(self, exists: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Mask a ratio of each image's visual tokens."""
        return mask_ratio(exists, self.settings.image_mask_ratio, generators)

    def fill(
        self, pixel_values: Tensor, masked: Tensor, patches_per_image: Sequence[int], generators: Sequence[Generator]
    ) -> Tensor:
        """Fill masked patches as ``patch_fill`` says."""
        return fill_patches(pixel_values, masked, self.settings.patch_fill, patches_per_image, generators)


class WarmupModel(JointModel):
    """A masked token is predicted from the state before it: ``loss = mntp + mae_weight * mae``."""

    text_loss = "mntp_loss"
    states_of = staticmethod(predicting_states)


class Warmup(Joint[WarmupSettings]):
    """Some text tokens and some visual tokens of ``[image][text]<EOS>`` are masked and reconstructed."""

    collator_class = WarmupCollator
    model_class = WarmupModel
