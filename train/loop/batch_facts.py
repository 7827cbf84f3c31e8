"""What is known of a batch beside its tensors, gathered in the worker that makes it."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from cocoa_embed.errors import CocoaError

FACTS = "facts"
"""The key of a batch's ``BatchFacts``."""


@dataclass(frozen=True)
class BatchFacts:
    """Plain numbers of a batch, read where its tensors are still on the CPU, so that no device has to wait for them.

    :param rows: Numbers of its rows.
    :param tokens: Tokens without padding.
    :param padded_tokens: Tokens with padding.
    :param flops: What forward and backward pass take; None where it is not asked for.
    :param hidden_tokens: Tokens to be predicted.
    :param hidden_patches: Raw patches to be predicted.
    :param failure: Why the batch could not be made; then it holds nothing else.
    """

    rows: tuple[int, ...] = ()
    tokens: int = 0
    padded_tokens: int = 0
    flops: float | None = None
    hidden_tokens: int = 0
    hidden_patches: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class DescribedBatches:
    """A collator whose batches say what they hold, and whose failures arrive as they are, whatever worker they are in.

    :param collate: The collator.
    :param rows_of: The numbers of the rows in the collator's examples.
    :param flops_of: What a batch of it takes to train on.
    """

    collate: Callable[[Any], dict[str, Any]]
    rows_of: Callable[[Any, dict[str, Any]], Sequence[int]]
    flops_of: Callable[[dict[str, Any]], float] | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate, and add the batch's ``BatchFacts``."""
        if get_worker_info() is not None:
            # A signal to all processes of a run is for the first of them, which ends the others when it has saved.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            batch = self.collate(examples)
        except CocoaError as error:
            return {FACTS: BatchFacts(failure=str(error))}
        masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
        return {
            **batch,
            FACTS: BatchFacts(
                rows=tuple(self.rows_of(examples, batch)),
                tokens=sum(int(mask.sum()) for mask in masks),
                padded_tokens=sum(mask.numel() for mask in masks),
                flops=None if self.flops_of is None else self.flops_of(batch),
                hidden_tokens=_count(batch.get("target_ids")),
                hidden_patches=_count(batch.get("target_patches")),
            ),
        }


def _count(targets: Tensor | None) -> int:
    return 0 if targets is None else len(targets)
