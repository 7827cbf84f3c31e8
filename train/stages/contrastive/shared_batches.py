"""Give each device its part of every batch."""

from collections.abc import Iterator

from sentence_transformers.base.sampler import SetEpochMixin
from torch.utils.data import BatchSampler


class SharedBatchSampler(BatchSampler):
    """Cuts each batch of all devices into equal parts, one per device, in their order.

    Devices take turns at the batches of a sampler. Parts of one batch come from one subset, with the same columns, as
    many rows each and no duplicate, as gathering candidates across devices needs.

    :param sampler: Draws the batches; up to ``devices - 1`` rows of a batch are left out, for parts of one size.
    """

    def __init__(self, sampler: BatchSampler, devices: int) -> None:
        self.batches = sampler
        self.devices = devices
        # So accelerate expects batches of different sizes, and uses each.
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
