"""The settings of stage 2."""

from typing import Literal, TypeAlias

from cocoa_embed.train.settings import Count, Positive, Ratio, ReconstructionSettings, Weight

Split: TypeAlias = Literal["whole", "halves"]


class BridgeSettings(ReconstructionSettings):
    """Stage 2: what block B is, how much of it is masked, and what is measured during the stage.

    :param split: ``halves`` cuts the long texts of rows without images in two, one half for each block.
    :param mask_ratio: The ratio of block B's tokens that are masked.
    :param eos_attends_to_b: Whether ``<EOS>`` attends to block B; false is for comparison.
    :param eos_similarity_weight: With several ``eos_tokens``, the weight of the mean squared cosine between the states
        of a row's ``<EOS>``, which keeps them apart.
    :param probe_rows: How many rows are held out of training to measure, every ``probe_steps`` steps, what ``<EOS>``
        carries, and the geometry of the embeddings.
    """

    split: Split = "whole"
    mask_ratio: Ratio = 0.7
    eos_attends_to_b: bool = True
    eos_similarity_weight: Weight = 0.1
    probe_rows: Count = 64
    probe_steps: Positive = 50
