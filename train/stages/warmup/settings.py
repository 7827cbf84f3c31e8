"""The settings of stage 1."""

from typing import Literal, TypeAlias

from cocoa_embed.train.settings import Ratio, Weight
from cocoa_embed.train.stages.joint.settings import JointSettings

PatchFill: TypeAlias = Literal["noise", "zero", "mean"]


class WarmupSettings(JointSettings):
    """Stage 1: masked next-token prediction, and masked patches of images.

    :param instruction_mask_ratio: The probability that a token of an instruction is masked; ``text_mask_ratio`` is that
        of a token of the content.
    :param patch_fill: What the vision encoder sees in place of masked patches.
    """

    text_mask_ratio: Ratio = 0.2
    instruction_mask_ratio: Ratio = 0.05
    image_mask_ratio: Ratio = 0.5
    patch_fill: PatchFill = "noise"
    mae_weight: Weight = 0.5
