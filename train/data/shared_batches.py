"""How the rows of a contrastive step are shared out among devices."""

from collections.abc import Iterator

from sentence_transformers.base.sampler import SetEpochMixin
from torch.utils.data import BatchSampler


class SharedBatchSampler(BatchSampler):
    """Cut each batch of all devices into equal parts, one for each, in a row.

    Devices take turns at a batch sampler's batches. Cut from one batch, what they get at a step is of one subset, with
    the same columns and as many rows, as gathering candidates across devices needs, and no two rows are alike.

    :param sampler: Draws the batches; up to ``devices - 1`` rows of a batch are left out, for parts of one size.
    :param devices: How many there are.
    """

    def __init__(self, sampler: BatchSampler, devices: int) -> None:
        self.batches = sampler
        self.devices = devices
        # Tells accelerate that batches differ in size, and that each is to be used.
        self.batch_size = None  # type: ignore[assignment]
        self.drop_last = False

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            size = len(batch) // self.devices
            if size:
                yield from (batch[part * size : (part + 1) * size] for part in range(self.devices))

    def __len__(self) -> int:
        return len(self.batches) * self.devices

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of another epoch."""
        if isinstance(self.batches, SetEpochMixin):
            self.batches.set_epoch(epoch)
