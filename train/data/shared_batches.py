"""Splits the batches of contrastive training among devices."""

from collections.abc import Iterator

from sentence_transformers.base.sampler import SetEpochMixin
from torch.utils.data import BatchSampler


class SharedBatchSampler(BatchSampler):
    """Cuts each batch into equal parts, one for each device.

    accelerate deals a batch sampler's batches out to the devices in turn. Parts of one batch have one subset, the same
    columns and as many rows, as gathering candidates across devices needs, and contain no duplicates.

    :param sampler: Draws the batches; up to ``devices - 1`` rows of a batch are left out, for parts of one size.
    :param devices: The number of devices.
    """

    def __init__(self, sampler: BatchSampler, devices: int) -> None:
        self.batches = sampler
        self.devices = devices
        # For accelerate: batches differ in size, and none is dropped.
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
