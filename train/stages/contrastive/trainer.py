"""The trainer of stage 3, from sentence-transformers."""

from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from torch.utils.data import BatchSampler

from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.stages.contrastive.batches import PairBatches
from cocoa_embed.train.stages.contrastive.mini_batches import TokenLimits


class ContrastiveTrainer(CocoaTrainer, SentenceTransformerTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The trainer of sentence-transformers with the checks of ``CocoaTrainer``.

    :param batches: The batches of the stage.
    :param limits: The sizes of its mini-batches, which may change before it trains.
    """

    def __init__(self, *args: Any, batches: PairBatches, limits: TokenLimits, **kwargs: Any) -> None:
        self._batches = batches
        self.limits = limits
        super().__init__(*args, **kwargs)

    def get_batch_sampler(self, *args: Any, **kwargs: Any) -> BatchSampler:
        """Return the batches, each of which is divided among the devices."""
        return self._batches
