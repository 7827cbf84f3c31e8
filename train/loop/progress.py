"""The progress bar of a stage with its metrics, and where else log lines go."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

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

TENSORBOARD = "tensorboard"


class StageProgressCallback(ProgressCallback):
    """Show a stage's name, its newest metrics and the time left in one line.

    :param shown: The metrics to show, and their labels.
    """

    def __init__(self, stage: str, shown: Mapping[str, str]) -> None:
        super().__init__()
        self.stage = stage
        self.shown = shown
        self._values: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the newest metrics beside the bar instead of printing them."""
        self._values |= {name: f"{logs[name]:.3f}" for name in self.shown if logs and name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix({self.shown[name]: value for name, value in self._values.items()})


class LogLastStep(TrainerCallback):
    """Logs the last step too, if it is not a multiple of ``logging_steps``."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line."""
        control.should_log |= state.global_step >= state.max_steps


def show_progress(trainer: Trainer, stage: str, shown: Mapping[str, str]) -> None:
    """Replace a trainer's progress output by ``StageProgressCallback``."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLastStep())
    trainer.add_callback(StageProgressCallback(stage, shown))


def end_reports(report_to: Iterable[str]) -> None:
    """End the stage's run in services that keep one open, so that the next stage begins its own."""
    for name in report_to:
        if name != TENSORBOARD:
            import_module(name).finish()


def write_tensorboard(trainer: Trainer, folder: Path) -> None:
    """Also write a trainer's log lines to ``folder`` for TensorBoard."""
    if trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder))))
