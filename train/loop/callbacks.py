"""Callbacks of a stage's trainer: the progress bar, TensorBoard, snapshots, and an orderly stop at SIGTERM."""

import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.loop.processes import reduce

TENSORBOARD = "tensorboard"


class StageProgressCallback(ProgressCallback):
    """Shows a stage's name, its newest metrics and the time left in one line.

    :param shown: The metrics to show, and their labels.
    """

    def __init__(self, stage: str, shown: Mapping[str, str]) -> None:
        super().__init__()
        self.stage = stage
        self.shown = shown
        self._values: dict[str, str] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Show the newest metrics beside the bar instead of printing them."""
        self._values |= {self.shown[name]: f"{logs[name]:.3f}" for name in self.shown if name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._values)


class LogLastStep(TrainerCallback):
    """Logs the last step too, if it is not a multiple of ``logging_steps``."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a log line."""
        control.should_log |= state.global_step >= state.max_steps


def show_progress(trainer: Trainer, stage: str, shown: Mapping[str, str]) -> None:
    """Replace a trainer's progress output by ``StageProgressCallback``."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLastStep())
    trainer.add_callback(StageProgressCallback(stage, shown))


def write_tensorboard(trainer: Trainer, folder: Path) -> None:
    """Also write a trainer's log lines to ``folder`` for TensorBoard."""
    if trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder))))


def end_reports(report_to: Iterable[str]) -> None:
    """End the stage's run in services that keep one open, so that the next stage begins its own."""
    for name in report_to:
        if name != TENSORBOARD:
            import_module(name).finish()


class SaveSnapshots(TrainerCallback):
    """Calls ``save`` after each of ``steps``, in every process, once the step's metrics are logged."""

    def __init__(self, steps: Collection[int], save: Callable[[int], object]) -> None:
        self.steps = frozenset(steps)
        self.save = save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a log line."""
        control.should_log |= state.global_step in self.steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Save the weights after the step."""
        if state.global_step in self.steps and "loss" in logs:
            self.save(state.global_step)


class Stopped(CocoaError):
    """The run was stopped by SIGTERM, and can be resumed."""

    exit_status = 128 + signal.SIGTERM
    is_raised_by_all = True


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint and stops at the end of the step in which SIGTERM arrives, at any of the processes."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM instead of ending the process, until the block ends."""
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
