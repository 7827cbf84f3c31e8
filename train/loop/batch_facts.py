"""Facts about a batch that the host knows without waiting for a device: counted in the collator, or read later."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.workers import outlive_a_signal

Batch: TypeAlias = dict[str, Tensor]
"""Named model inputs and targets; a batch without images has no image tensors."""

FACTS = "facts"
"""The key of a batch's ``BatchFacts``."""


@dataclass(frozen=True)
class BatchFacts:
    """Facts about a batch, counted while its tensors are on the CPU, so that no device has to wait.

    :param rows: The numbers of its rows.
    :param tokens: The number of tokens without padding.
    :param padded_tokens: The number of tokens with padding.
    :param flops: FLOPs of forward and backward pass, if they are counted.
    :param targets: The number of targets in each ``target_*`` tensor.
    :param failure: The error that the collator raised; the batch then holds nothing else.
    """

    rows: tuple[int, ...] = ()
    tokens: int = 0
    padded_tokens: int = 0
    flops: float | None = None
    targets: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class DescribedBatches:
    """A collator that adds ``BatchFacts`` to its batches; a failure in a worker becomes one of these facts.

    :param flops_of: Returns the FLOPs of training on a batch.
    """

    collate: Callable[[list[Example]], dict[str, Any]]
    flops_of: Callable[[dict[str, Any]], float] | None = None

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Collate, and add the batch's ``BatchFacts``."""
        if get_worker_info() is not None:
            outlive_a_signal()
        try:
            batch = self.collate(examples)
        except CocoaError as error:
            return {FACTS: BatchFacts(failure=str(error))}
        masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
        return {
            **batch,
            FACTS: BatchFacts(
                rows=tuple(draw.row for draw, _ in examples),
                tokens=sum(int(mask.sum()) for mask in masks),
                padded_tokens=sum(mask.numel() for mask in masks),
                flops=None if self.flops_of is None else self.flops_of(batch),
                targets={name: len(value) for name, value in batch.items() if name.startswith("target_")},
            ),
        }


class LateReading:
    """A non-blocking copy of a tensor to the CPU; read it later, when it is likely to have arrived.

    :param value: The tensor, on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._copy = value.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Tensor:
        """Return the copy, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
