"""Time a few steps of each stage on this machine: ``cocoa-embed train RECIPE --dry-run=timed``."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from cocoa_embed.train.loop.oom import explain_out_of_memory
from cocoa_embed.train.loop.processes import taking_turns
from cocoa_embed.train.pipeline import choose_sizes, load_weights, stage_context
from cocoa_embed.train.plan.checks import Prepared
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.stage import Stage

TIMED_STEPS = 3
"""Steps to time, after one step that is not timed."""


class Stopwatch(TrainerCallback):
    """Records the time at the end of each step, once the device has finished it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for the device, and record the time."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


def seconds_per_step(prepared: Prepared) -> dict[str, float]:
    """Return the seconds of an optimisation step of each unfinished stage; every process of the run calls this.

    The steps are those of the run, with its rows, batches and weights; the trained weights are discarded.

    :raises CocoaError: If the weights cannot be loaded, or a step does not fit into memory.
    """
    start = str(prepared.results[-1].folder) if prepared.results else prepared.recipe.backbone
    seconds = {}
    for name in prepared.rows:
        stage = prepared.recipe.stages[name]
        with explain_out_of_memory(name, stage.weights_remedies()), tempfile.TemporaryDirectory() as folder:
            seconds[name] = _time(stage, prepared, start, Path(folder))
        clear_device_cache(garbage_collection=True)
    return seconds


def _time(stage: Stage[StageSettings], prepared: Prepared, start: str, folder: Path) -> float:
    steps = {**prepared.steps, stage.name: 1 + TIMED_STEPS}
    rows = prepared.rows[stage.name].rows
    with taking_turns():
        backbone = load_weights(stage, start)
        context = stage_context(stage, replace(prepared, steps=steps), backbone, folder)
        context = replace(context, arguments={**context.arguments, "save_strategy": "no", "report_to": "none"})
        trainer, watch = stage.trainer(backbone, rows, context), Stopwatch()
    choose_sizes(stage, trainer, rows)
    trainer.probe = None
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(watch)
    trainer.train()
    return (watch.ends[-1] - watch.ends[0]) / (len(watch.ends) - 1)
