"""The settings of MoCa's pre-training."""

from cocoa_embed.train.settings import Ratio, Weight
from cocoa_embed.train.stages.joint.settings import JointSettings


class MocaSettings(JointSettings):
    """MoCa's pre-training, with the values of its authors' script."""

    text_mask_ratio: Ratio = 0.4
    image_mask_ratio: Ratio = 0.5
    mae_weight: Weight = 0.1
