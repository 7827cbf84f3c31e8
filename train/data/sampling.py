"""The order of rows: a function of the seed, the same on any number of devices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler

from cocoa_embed.train.data.rows import Draw

WINDOW = 32
"""Batches that are sorted by length together: enough to pad little, few enough to stay random."""


@dataclass(eq=False)
class RowStream(Sampler[Draw]):
    """Draws every row once an epoch in random order, epoch after epoch.

    The end of an epoch does not cut a batch: the next epoch continues in it.

    :param rows: The number of rows.
    :param draws: The number of draws, a multiple of ``batch_size``.
    :param batch_size: Rows of a step, over all devices.
    :param lengths_of: Returns the numbers of tokens of rows, given the rows' numbers. With it, batches have rows
        of similar length: the rows of ``WINDOW`` batches are sorted by length, and the batches come in random order.
    :param skipped: The number of first draws that a resumed run skips: windows of only these are not sorted.
    :raises ValueError: If there are no rows.
    """

    rows: int
    draws: int
    batch_size: int
    seed: int
    lengths_of: Callable[[Sequence[int]], Sequence[int]] | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError("there are no rows to draw from")

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[Draw]:
        draws = islice(self._epochs(), self.draws)
        return draws if self.lengths_of is None else self._grouped(draws, self.lengths_of)

    def _epochs(self) -> Iterator[Draw]:
        for epoch in count():
            order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            yield from (Draw(int(index), epoch) for index in order)

    def _grouped(self, draws: Iterator[Draw], lengths_of: Callable[[Sequence[int]], Sequence[int]]) -> Iterator[Draw]:
        generator, end = np.random.default_rng([self.seed, self.rows, self.draws]), 0
        while window := list(islice(draws, WINDOW * self.batch_size)):
            end += len(window)
            if end > self.skipped:
                order = np.argsort(lengths_of([draw.row for draw in window]), kind="stable")
                window = [window[place] for place in order]
            starts = np.arange(0, len(window), self.batch_size)
            for start in generator.permutation(starts):
                yield from window[start : start + self.batch_size]
