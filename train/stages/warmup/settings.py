"""The settings of stage 1."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from cocoa_embed.train.settings import Ratio, ReconstructionSettings

PatchFill: TypeAlias = Literal["noise", "zero", "mean"]


class WarmupSettings(ReconstructionSettings):
    """Stage 1: which parts of texts and images are masked, and how the two losses are weighed.

    :param text_mask_ratio: The probability that a token of a text's content is masked.
    :param instruction_mask_ratio: The probability that a token of an instruction is masked.
    :param image_mask_ratio: The ratio of an image's visual tokens that is masked.
    :param patch_fill: What the vision encoder sees in place of masked patches.
    :param mae_weight: The weight of the pixel loss beside the text loss.
    :param normalise_targets: Give each target patch zero mean and unit variance.
    """

    text_mask_ratio: Ratio = 0.2
    instruction_mask_ratio: Ratio = 0.05
    image_mask_ratio: Ratio = 0.5
    patch_fill: PatchFill = "noise"
    mae_weight: Annotated[float, Field(ge=0)] = 0.5
    normalise_targets: bool = False


DEFAULTS = WarmupSettings(steps=1, batch_size=1)
