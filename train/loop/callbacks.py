"""Callbacks of a stage's trainer: progress bar, TensorBoard, snapshots, checkpoints at intervals and at signals."""

import logging
import signal
import threading
import time
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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.loop.batch_facts import LateReading
from cocoa_embed.train.loop.checkpoints import step_of
from cocoa_embed.train.loop.processes import training_patience

TENSORBOARD = "tensorboard"

logger = logging.getLogger(__name__)


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
        """Show the newest metrics next to the bar instead of printing them."""
        self._values |= {self.shown[name]: f"{logs[name]:.3f}" for name in self.shown if name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._values)


class LogLastStep(TrainerCallback):
    """Logs the last step too, if it is not a multiple of ``logging_steps``."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a log line."""
        control.should_log |= state.global_step >= state.max_steps


def show_progress(trainer: Trainer, stage: str, shown: Mapping[str, str]) -> None:
    """Replace a trainer's progress output with ``StageProgressCallback``."""
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

    def on_log(self, args: object, state: TrainerState, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Save the weights after the step."""
        if state.global_step in self.steps and "loss" in logs:
            self.save(state.global_step)


class Stopped(CocoaError):
    """The run was stopped by a signal, and can be resumed.

    :param number: SIGTERM, or SIGINT of Ctrl-C.
    :param where: The step that the run has reached, in words.
    """

    is_raised_by_all = True

    def __init__(self, number: int, where: str) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        super().__init__(f"Stopped by {name} {where}; the same command with --resume continues from there.")
        self.exit_status = 128 + number


class SaveAndStop(TrainerCallback):
    """Saves a checkpoint every few minutes; saves one and stops at the end of the step in which a signal arrives.

    The signal is SIGTERM or Ctrl-C, at any of the processes. A second Ctrl-C ends the process at once.

    :param minutes: Time from one checkpoint to the next, by the clock of the first process; None saves by steps only.
    """

    def __init__(self, trainer: Trainer, minutes: float | None) -> None:
        self.trainer = trainer
        self.seconds = float("inf") if minutes is None else minutes * 60
        self.requested = 0
        """The number of the signal that the processes have agreed to stop at, if any."""
        self._arrived = 0
        self._unread: LateReading | None = None
        self._saved_at = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals instead of ending the process, until the block ends; ignored signals stay ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number, before in self._handlers.items():
            signal.signal(number, self._request if before != signal.SIG_IGN else before)
        try:
            yield
        finally:
            for number, before in self._handlers.items():
                signal.signal(number, before)

    def train(self, checkpoint: Path | None, stage: str) -> None:
        """Train to the last step, from a checkpoint if there is one.

        :raises Stopped: If a signal has stopped it before.
        """
        trainer, steps = self.trainer, self.trainer.args.max_steps
        if checkpoint is not None and step_of(checkpoint) >= steps and not trainer.is_fsdp_enabled:
            trainer._load_from_checkpoint(str(checkpoint))  # killed before the weights of the last step were written
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        else:
            with self.listening(), training_patience():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        reached = trainer.state.global_step
        if self.requested and reached < steps:
            raise Stopped(self.requested, f"at step {reached} of {steps} of stage {stage}")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Start the clock, and save as often as the settings say now: the checkpoint has restored earlier ones."""
        self._saved_at = time.monotonic()
        state.compute_steps(args, state.max_steps)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Restart the clock."""
        self._saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save or stop if the processes have agreed to, so that all of them do so at the same step."""
        is_due = self._agree()
        if state.global_step < state.max_steps:
            control.should_save |= is_due or bool(self.requested)
            control.should_training_stop |= bool(self.requested)

    def any_requested(self) -> bool:
        """Return whether any process has received a signal; all processes must call this."""
        self._agree(at_once=True)
        return bool(self.requested)

    def _agree(self, *, at_once: bool = False) -> bool:
        """Return whether a checkpoint is due in the first process, and adopt a signal that any process has received.

        A signal that arrives meanwhile counts at the next step. On CUDA, several processes use what they exchanged at
        the step before, so that none has to wait; with ``at_once`` they wait.
        """
        is_due = time.monotonic() - self._saved_at >= self.seconds
        seen: Any = torch.tensor([[self._arrived, is_due]])
        if (accelerator := self.trainer.accelerator).num_processes > 1:
            seen = accelerator.gather(seen.to(accelerator.device, non_blocking=True))
        before, self._unread = self._unread, LateReading(seen)
        if not seen.is_cuda or at_once:
            before = self._unread
        if before is None:
            return False
        agreed = before.read()
        self.requested = int(agreed[:, 0].max())
        return bool(agreed[0, 1])

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._arrived = number
        if number == signal.SIGINT:
            signal.signal(number, self._handlers[signal.SIGINT])
            logger.warning("stopping after this step, with a checkpoint; another Ctrl-C ends at once, without")
