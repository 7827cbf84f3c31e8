"""Snapshots: weights saved on the way through a stage, each as a checkpoint of its own."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.model.training_record import TRAINING_FILE


class SaveSnapshots(TrainerCallback):
    """Calls ``save`` with the step after each of ``steps``, in every process, when the log has a line of that step."""

    def __init__(self, steps: Collection[int], save: Callable[[int], object]) -> None:
        self.steps = frozenset(steps)
        self.save = save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line."""
        control.should_log |= state.global_step in self.steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the weights after the step."""
        if state.global_step in self.steps and logs and "loss" in logs:
            self.save(state.global_step)


def snapshot_folder(stage_folder: Path, step: int) -> Path:
    """Return the folder of a step's snapshot."""
    return stage_folder / f"step-{step}"


def remove_unfinished(stage_folder: Path) -> None:
    """Remove what an interrupted stage was writing; complete snapshots stay."""
    for path in stage_folder.glob("*"):
        if path.is_dir() and not (path / TRAINING_FILE).is_file():
            shutil.rmtree(path, ignore_errors=True)
        elif not path.is_dir():
            path.unlink()
