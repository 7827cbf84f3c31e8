"""The speed of a stage: tokens per second, model FLOPs utilisation, and the ratio of time spent waiting for data."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from cocoa_embed.train.loop.batch_facts import BatchFacts


class Throughput:
    """A stopwatch for the steps between two log lines.

    :param peak_flops: FLOP/s of a matrix product on this device, the peak of the utilisation; None leaves it out.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self.restart()

    def restart(self) -> None:
        """Reset time and counts."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._tokens = 0
        self._flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside the block, which is not training."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def count(self, batches: Sequence[BatchFacts]) -> None:
        """Count the batches of a step."""
        self._tokens += sum(facts.tokens for facts in batches)
        self._flops += sum(facts.flops or 0.0 for facts in batches)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Return ``tokens_per_second`` of all devices, ``data_wait_ratio`` and, if operations are counted, ``mfu``."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        seen = torch.tensor([self._tokens, self._flops, self._waited], dtype=torch.float32, device=accelerator.device)
        sums: Any = accelerator.reduce(seen, "sum")
        tokens, flops, waited = sums.tolist()
        metrics = {
            "tokens_per_second": tokens / seconds,
            "data_wait_ratio": min(waited / accelerator.num_processes / seconds, 1.0),
        }
        if self.peak_flops is not None and flops:
            metrics["mfu"] = flops / seconds / (self.peak_flops * accelerator.num_processes)
        return metrics
