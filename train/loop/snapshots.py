"""Weights kept on the way through a stage, each as a checkpoint of its own."""

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.errors import UsageError
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.recipe import Recipe


class KeepSteps(TrainerCallback):
    """Calls ``keep`` with the step after each of ``steps``, in every process, when the log has a line of it."""

    def __init__(self, steps: Collection[int], keep: Callable[[int], object]) -> None:
        self.steps = frozenset(steps)
        self.keep = keep

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
        """Keep the weights that the step has left."""
        if state.global_step in self.steps and logs and "loss" in logs:
            self.keep(state.global_step)


def kept_folder(stage_folder: Path, step: int) -> Path:
    """Return where the weights of a step are kept."""
    return stage_folder / f"step-{step}"


def remove_unfinished(stage_folder: Path) -> None:
    """Remove what a stage was writing when its run was ended; weights that are kept whole stay."""
    for path in stage_folder.glob("*"):
        if path.is_dir() and not (path / TRAINING_FILE).is_file():
            shutil.rmtree(path, ignore_errors=True)
        elif not path.is_dir():
            path.unlink()


def refuse_steps_past_the_end(recipe: Recipe, steps: Mapping[str, int]) -> None:
    """Check that a stage comes to every step whose weights are to be kept.

    :param steps: How many each stage has.
    :raises UsageError: If it ends before, or with it.
    """
    for stage, count in steps.items():
        late = [step for step in recipe.section(stage).keep_steps if step >= count]
        if late:
            raise UsageError(
                f"{stage}.keep_steps names step {late[0]}, but the stage ends at step {count}, whose weights are kept "
                "anyway; give earlier steps."
            )
