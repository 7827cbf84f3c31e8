"""Plain numbers of a batch beside its tensors, counted in the worker that makes it."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import get_worker_info

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.rows import Draw

Batch: TypeAlias = dict[str, Tensor]
"""Named model inputs and targets; what a batch does not have (images, say) is left out."""

Example: TypeAlias = tuple[Draw, Row]
"""A row, and which draw of it this is."""

FACTS = "facts"
"""The key of a batch's ``BatchFacts``."""


@dataclass(frozen=True)
class BatchFacts:
    """Numbers of a batch, counted while its tensors are on the CPU, so that no device has to wait for them.

    :param rows: The numbers of its rows.
    :param tokens: Tokens without padding.
    :param padded_tokens: Tokens with padding.
    :param flops: Operations of forward and backward pass, if they are counted.
    :param targets: How many of each tensor ``target_*`` there are to predict.
    :param failure: Why the batch could not be made; then it holds nothing else.
    """

    rows: tuple[int, ...] = ()
    tokens: int = 0
    padded_tokens: int = 0
    flops: float | None = None
    targets: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class DescribedBatches:
    """A collator that adds ``BatchFacts`` to its batches, and passes failures on from any worker.

    :param rows_of: Returns the numbers of the rows in the collator's examples.
    :param flops_of: Returns the operations of training on a batch.
    """

    collate: Callable[[Any], dict[str, Any]]
    rows_of: Callable[[Any], Sequence[int]]
    flops_of: Callable[[dict[str, Any]], float] | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate, and add the batch's ``BatchFacts``."""
        if get_worker_info() is not None:
            # A signal to all processes of a run is for the first, which ends its workers when it has saved.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            batch = self.collate(examples)
        except CocoaError as error:
            return {FACTS: BatchFacts(failure=str(error))}
        masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
        return {
            **batch,
            FACTS: BatchFacts(
                rows=tuple(self.rows_of(examples)),
                tokens=sum(int(mask.sum()) for mask in masks),
                padded_tokens=sum(mask.numel() for mask in masks),
                flops=None if self.flops_of is None else self.flops_of(batch),
                targets={name: len(value) for name, value in batch.items() if name.startswith("target_")},
            ),
        }
