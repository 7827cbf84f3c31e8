"""The settings of stage 3."""

from typing import Literal

from cocoa_embed.train.settings import Auto, Count, Positive, Rate, StageSettings, Weight


class ContrastiveSettings(StageSettings):
    """Stage 3: the contrastive loss, and how the stage is measured.

    A candidate that equals a query's positive, or is the positive of an equal query, is no negative of it.

    Gradients are cached, so that the batch may be larger than memory allows.

    :param mini_batch_tokens: The most tokens that a device runs at once, visual tokens and padding included; a longer
        item runs alone. ``auto``: as many as fit into the device's memory, one number for texts and one for images;
        on a CPU 8192. It does not change what is learned.
    :param directions: ``forward``: queries are matched to their positives. ``both``: each pair is trained from either
        side, in batches of their own. ``symmetric``: one loss matches queries to positives and positives to queries.
    :param hard_negatives: The most of a row's own negatives to use. They are candidates of every query of the batch.
    :param matryoshka_dims: Lengths at which the first values of an embedding are embeddings themselves, in addition to
        the whole length.
    :param reconstruction_weight: Add the bridge's loss on the batch's rows, times this weight: from an ``<EOS>`` that
        does not attend to block B, as that of an embedding, and with 70 % of block B masked. 0 leaves it out.
    :param probe_rows: Pairs to measure the embeddings' geometry on, every ``probe_steps`` steps: the first with an
        image, one per image. They are trained on, so the metrics show the progress and are no scores. 0 turns it off,
        and so do fewer than two images.
    """

    mini_batch_tokens: Positive | Auto = "auto"
    temperature: Rate = 0.02
    directions: Literal["forward", "both", "symmetric"] = "both"
    hard_negatives: Count = 0
    matryoshka_dims: list[Positive] | None = None
    reconstruction_weight: Weight = 0.0
    probe_rows: Count = 64
    probe_steps: Positive = 50
