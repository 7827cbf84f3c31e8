"""The settings of stage 2."""

from cocoa_embed.train.settings import Count, Positive, Ratio, ReconstructionSettings


class BridgeSettings(ReconstructionSettings):
    """Stage 2: how much of block B is masked, and how the stage is measured.

    :param mask_ratio: The ratio of block B's tokens that is masked.
    :param eos_attends_to_b: False: ``<EOS>`` does not attend to block B, for comparison.
    :param probe_rows: Rows held out of training to measure, every ``probe_steps`` steps, what ``<EOS>`` carries and
        the geometry of the embeddings.
    """

    mask_ratio: Ratio = 0.7
    eos_attends_to_b: bool = True
    probe_rows: Count = 64
    probe_steps: Positive = 50
