"""Which rows share a batch of stage 3: their groups, what a step holds, and the order of batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import BatchSampler

from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings

FEW_ANSWERS = 8
"""With fewer different positives, a row has few negatives in a batch."""


@dataclass(frozen=True)
class PairGroup:
    """Rows that may share a batch: of one subset, with equally many hard negatives, seen from the same side.

    :param rows: Their numbers, int32 ``[rows]``; for rows seen from the other side, plus the number of all rows.
    """

    subset: str
    hard_negatives: int
    rows: np.ndarray

    def batches(self, batch_size: int, devices: int) -> int:
        """Return the number of batches in an epoch, of ``batch_size`` rows over all devices."""
        fewest = devices if self.hard_negatives else max(2, devices)
        return (len(self.rows) + batch_size - min(fewest, batch_size)) // batch_size


@dataclass(frozen=True)
class StepContent:
    """What a step on rows of one subset holds, in numbers.

    :param hard_negatives: How many each row has; a subset whose rows have different numbers has several entries.
    :param rows: All rows of the subset.
    :param queries: Different queries among them.
    :param positives: Different positives among them.
    :param rows_a_step: Rows of a batch, over all devices.
    :param batches: Batches of an epoch.
    """

    subset: str
    hard_negatives: int
    rows: int
    queries: int
    positives: int
    rows_a_step: int
    batches: int

    def fault(self, devices: int) -> str | None:
        """Return why no step can be trained on these rows, None if it can."""
        reason = None
        if self.rows_a_step < devices:
            reason = f"has too few rows for {devices} devices"
        elif not self.hard_negatives and min(self.queries, self.positives, self.rows_a_step) < 2:
            reason = "has nothing to contrast in a batch"
        return reason and (
            f"{reason} (rows {self.rows}, of a step {self.rows_a_step}, different queries {self.queries}, "
            f"different positives {self.positives})"
        )

    def warning(self, batch_size: int) -> str | None:
        """Return what is unusual about these rows, None if nothing is."""
        answers = min(self.queries, self.positives)
        if not self.hard_negatives and answers < FEW_ANSWERS:
            return f"has {answers} different {'positives' if self.positives == answers else 'queries'}: few negatives"
        if self.rows_a_step < batch_size:
            return f"has {self.rows} rows: its batches have {self.rows_a_step}, not {batch_size}"
        return None


def pair_groups(rows: RowTable, settings: ContrastiveSettings) -> list[PairGroup]:
    """Return the groups of rows; with ``directions: both`` each row is also in a second group, from its other side."""
    subset = rows.column("subset")
    negatives = np.zeros(len(rows), np.int64)
    if settings.hard_negatives:
        negatives = np.minimum(rows.column("negatives"), settings.hard_negatives)
    groups = []
    for number in np.unique(subset):
        members, name = np.flatnonzero(subset == number).astype(np.int32), rows.subsets[number]
        counts = negatives[members]
        groups += [PairGroup(name, int(each), members[counts == each]) for each in np.unique(counts)]
        if settings.directions == "both":
            groups.append(PairGroup(name, 0, members + np.int32(len(rows))))
    return groups


def step_contents(rows: RowTable, settings: ContrastiveSettings, devices: int) -> list[StepContent]:
    """Return what a step holds, by subset and number of hard negatives. Rows seen from either side are counted once."""
    queries, positives = rows.column("query_id"), rows.column("positive_id")
    contents = []
    for group in pair_groups(rows, settings.model_copy(update={"directions": "forward"})):
        members = group.rows
        contents.append(
            StepContent(
                group.subset,
                group.hard_negatives,
                rows=len(members),
                queries=len(np.unique(queries[members])),
                positives=len(np.unique(positives[members])),
                rows_a_step=min(settings.batch_size, len(members)) // devices * devices,
                batches=group.batches(settings.batch_size, devices),
            )
        )
    return contents


class PairBatches(BatchSampler):
    """Draws batches for all devices together, epoch after epoch; the devices' equal parts follow one another.

    An epoch shuffles each group, cuts it into batches, of which the last may be smaller, and takes the batches of all
    groups in random order. It leaves out a batch of a single pair, which has nothing to contrast, and rows that cannot
    be divided equally among the devices.

    :param batch_size: Rows of a batch, over all devices.
    :param steps: The number of batches.
    :param turns: How many numbers stand for each pair, ``span`` apart; successive epochs use them in turn.
    :raises ValueError: If an epoch has no batch.
    """

    def __init__(
        self,
        groups: list[PairGroup],
        batch_size: int,
        steps: int,
        seed: int,
        devices: int,
        turns: int = 1,
        span: int = 0,
    ) -> None:
        self.groups, self.size, self.steps, self.seed, self.devices = groups, batch_size, steps, seed, devices
        self.turns, self.span = turns, span
        if not any(group.batches(batch_size, devices) for group in groups):
            raise ValueError("no group has enough rows for a batch")
        # With these values accelerate expects batches of different sizes, and uses each of them.
        self.batch_size = None  # type: ignore[assignment]
        self.drop_last = False

    def __len__(self) -> int:
        return self.steps * self.devices

    def __iter__(self) -> Iterator[list[int]]:
        epochs = ((epoch % self.turns * self.span, self._epoch(self.seed + epoch)) for epoch in count())
        batches = (batch + offset for offset, epoch in epochs for batch in epoch)
        for batch in islice(batches, self.steps):
            size = len(batch) // self.devices
            yield from (batch[part * size : (part + 1) * size].tolist() for part in range(self.devices))

    def _epoch(self, seed: int) -> Iterator[np.ndarray]:
        rows = [group.rows[_permutation(len(group.rows), seed)] for group in self.groups]
        turns = np.repeat(np.arange(len(rows)), [group.batches(self.size, self.devices) for group in self.groups])
        taken = [0] * len(rows)
        for group in turns[_permutation(len(turns), seed)]:
            yield rows[group][taken[group] : taken[group] + self.size]
            taken[group] += self.size


def _permutation(length: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    permutation: np.ndarray = torch.randperm(length, generator=generator, dtype=torch.int32).numpy()
    return permutation
