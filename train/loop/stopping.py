"""SIGTERM saves a checkpoint, then ends the run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.loop.processes import reduce


class Stopped(CocoaError):
    """The run was stopped by SIGTERM, and can be resumed."""

    exit_status = 128 + signal.SIGTERM
    is_raised_by_all = True


class StopOnSigterm(TrainerCallback):
    """Save and stop at the end of the step in which SIGTERM arrives, at any of the processes."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM instead of ending the process, until the block ends."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        before = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if any process got the signal, so that all do at the same step."""
        if self.any_requested() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def any_requested(self) -> bool:
        """Return whether any process got the signal; all of them must call this."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            requested = torch.tensor([int(self.requested)], device=accelerator.device)
            self.requested = bool(reduce(accelerator, requested, "sum").item())
        return self.requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
