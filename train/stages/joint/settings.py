"""The settings of a joint reconstruction."""

from cocoa_embed.train.settings import Ratio, ReconstructionSettings, Weight


class JointSettings(ReconstructionSettings):
    """Which parts of texts and images are masked, and how the two losses are weighed.

    :param text_mask_ratio: The probability that a token of a text is masked.
    :param image_mask_ratio: The ratio of visual tokens that are masked.
    :param mae_weight: The weight of the pixel loss, relative to the text loss.
    :param normalise_targets: Give each target patch zero mean and unit variance.
    """

    text_mask_ratio: Ratio
    image_mask_ratio: Ratio
    mae_weight: Weight
    normalise_targets: bool = False
