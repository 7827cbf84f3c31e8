"""The progress bar of a stage, with its losses beside it."""

from collections.abc import Iterable
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
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from cocoa_embed.train.stages.probe import MATCHING_IMAGE, NO_IMAGE, SHUFFLED_IMAGE

SHOWN = ("loss", "mntp_loss", "mae_loss", "masked_token_accuracy", MATCHING_IMAGE, SHUFFLED_IMAGE, NO_IMAGE)
_SHORT = {
    "mntp_loss": "text",
    "mae_loss": "pixels",
    "masked_token_accuracy": "accuracy",
    MATCHING_IMAGE: "matching",
    SHUFFLED_IMAGE: "shuffled",
    NO_IMAGE: "no image",
}


TENSORBOARD = "tensorboard"


class LiveLossCallback(ProgressCallback):
    """Show a stage's name, its losses and the time left in one line."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self._shown: dict[str, str] = {}

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
        """Put the newest figures beside the bar instead of printing them."""
        self._shown |= {_SHORT.get(name, name): f"{logs[name]:.3f}" for name in SHOWN if logs and name in logs}
        if self.training_bar is not None:
            # What kept rows tell says more than the batch's own accuracy, and a line has room for one of the two.
            is_probed = _SHORT[MATCHING_IMAGE] in self._shown
            hidden = {_SHORT["masked_token_accuracy"]} if is_probed else set()
            self.training_bar.set_postfix({name: told for name, told in self._shown.items() if name not in hidden})


class LogLastStep(TrainerCallback):
    """Log the last step too, where it is no multiple of ``logging_steps``."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line."""
        control.should_log |= state.global_step >= state.max_steps


def show_live_losses(trainer: Trainer, stage: str) -> None:
    """Replace a trainer's progress output by ``LiveLossCallback``."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLastStep())
    trainer.add_callback(LiveLossCallback(stage))


def end_reports(report_to: Iterable[str]) -> None:
    """End a stage's run of services that keep one open, or the next stage's lines would go into it."""
    for name in report_to:
        if name != TENSORBOARD:
            import_module(name).finish()


def write_tensorboard(trainer: Trainer, folder: Path) -> None:
    """Let a trainer's log lines go to ``folder`` for TensorBoard too."""
    if trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder))))
