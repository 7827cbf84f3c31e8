"""The settings of stage 3."""

from typing import Literal

from cocoa_embed.train.settings import Auto, Count, Positive, Rate, StageSettings, Weight


class ContrastiveSettings(StageSettings):
    """Stage 3: the contrastive loss, and what is measured during the stage.

    A candidate that equals a query's positive, or is the positive of an equal query, is not a negative of that query.

    Gradients are cached, so that the batch may be larger than memory allows.

    :param mini_batch_tokens: The maximum tokens that a device runs at once, visual tokens and padding included; a
        longer item runs alone. ``auto``: as many as fit into the device's memory, one number for texts and one for
        images; 8192 on a CPU. It does not change what is learned.
    :param directions: ``forward``: queries are matched to their positives. ``both``: each pair is trained from either
        side, in separate batches. ``symmetric``: one loss matches queries to positives and positives to queries.
    :param hard_negatives: At most how many of a row's negatives to use. They are candidates of every query of the
        batch.
    :param matryoshka_dims: Lengths, in addition to the whole one, to which an embedding can be cut.
    :param reconstruction_weight: Add the bridge's loss on the batch's rows, times this weight. ``<EOS>`` does not
        attend to block B there, as in an embedding, and 70 % of block B is masked. 0 leaves the loss out.
    :param probe_rows: Pairs to measure the embeddings' geometry on, every ``probe_steps`` steps: at most one per
        image, from all subsets. They are trained on, so the metrics show progress and are not scores. 0 turns the probe
        off, and so do fewer than two images.
    """

    mini_batch_tokens: Positive | Auto = "auto"
    temperature: Rate = 0.02
    directions: Literal["forward", "both", "symmetric"] = "both"
    hard_negatives: Count = 0
    matryoshka_dims: list[Positive] | None = None
    reconstruction_weight: Weight = 0.0
    probe_rows: Count = 64
    probe_steps: Positive = 50
