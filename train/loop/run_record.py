"""The records of a run: ``run.json``, updated while stages train, and the training record of each checkpoint."""

import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed import __version__
from cocoa_embed.model.backbone import Origin, origin
from cocoa_embed.model.training_record import (
    TRAINING_FILE,
    read_run,
    read_training,
    run_of,
    write_run,
    write_training,
)
from cocoa_embed.train.data.mixture import ReadRows
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.recipe import SOURCE_KINDS, Recipe
from cocoa_embed.train.settings import SourceSettings

LIBRARIES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "peft")
SHOWN_BAD_ROWS = 12


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    :param folder: The stage's checkpoint.
    :param rows: The number of its rows, those of its probe included.
    :param seconds: Wall-clock time of its training loop.
    :param log: Its log lines: ``step`` and the metrics of that step.
    :param facts: Facts for the model card: ``description``, a text, and ``matryoshka_dims``.
    """

    stage: str
    folder: Path
    steps: int
    rows: int
    seconds: float
    log: list[dict[str, float]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> dict[str, float]:
        """The last logged value of each metric."""
        return {name: value for line in self.log for name, value in line.items()}


@dataclass(frozen=True)
class Start:
    """The origin of a run's weights: a backbone, and the stages of earlier runs that trained them."""

    backbone: str
    origin: Origin
    stages: list[dict[str, Any]]
    data: list[str]


def read_start(name_or_path: str) -> Start:
    """Return the origin of a recipe's ``backbone``, which may be a checkpoint of an earlier run.

    :raises CocoaError: If the checkpoint's record is broken, or its stage is not finished.
    """
    folder = Path(name_or_path)
    if (folder / TRAINING_FILE).is_file():
        earlier = read_training(folder)
        return Start(earlier["backbone"], earlier["origin"], earlier["stages"], [earlier["data"]])
    return Start(name_or_path, origin(name_or_path), [], [])


def new_run(recipe: Recipe, start: Start, rows: Mapping[str, ReadRows], steps: Mapping[str, int]) -> dict[str, Any]:
    """Return the first ``run.json`` of a run, with the optimisation ``steps`` of each stage."""
    return {
        "id": uuid.uuid4().hex,
        "cocoa_embed": __version__,
        "libraries": {name: version(name) for name in LIBRARIES},
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(PartialState().device),
            "processes": PartialState().num_processes,
        },
        "backbone": start.backbone,
        "origin": start.origin,
        "inherited": {"stages": start.stages, "data": start.data},
        "recipe": recipe.model_dump(mode="json"),
        "given": recipe.model_dump(mode="json", exclude_unset=True),
        "stages": {stage: _new_stage(recipe, stage, read, steps[stage]) for stage, read in rows.items()},
    }


def _new_stage(recipe: Recipe, stage: str, read: ReadRows, steps: int) -> dict[str, Any]:
    sources, bad = recipe.sources_of(stage), list(dict.fromkeys(read.bad))
    return {
        "sources": {name: each.model_dump(mode="json", exclude_defaults=True) for name, each in sources.items()},
        "places": sorted({os.path.realpath(_name(source)) for source in sources.values()}),
        "rows": read.rows.counts,
        "fingerprint": read.rows.fingerprint,
        "bad_rows": {
            "count": len(bad),
            "first": [[row.subset, row.source, row.reason] for row in bad[:SHOWN_BAD_ROWS]],
        },
        "batch_size": recipe.stages[stage].settings.batch_size,
        "steps": steps,
        "step": 0,
        "seconds": 0.0,
        "finished": False,
        "log": [],
    }


def _name(source: SourceSettings) -> str:
    """Return the path of a source, or the name of a data set on the hub."""
    return next(str(given) for kind in SOURCE_KINDS if (given := getattr(source, kind)) is not None)


def update_stage(out: Path, stage: str, **values: Any) -> None:
    """Set keys of a stage in ``run.json``."""
    run = read_run(out)
    run["stages"][stage].update(values)
    write_run(out, run)


def record_begin(out: Path, stage: str, trainer: CocoaTrainer, held_out: np.ndarray) -> None:
    """Record how many parameters a stage trains, and the indices of its rows that are held out of training."""
    stages = read_run(out)["stages"]
    earlier = list(stages)[: list(stages).index(stage)]
    update_stage(
        out,
        stage,
        trained_parameters=trainer.get_num_trainable_parameters(),
        held_out={
            "rows": held_out.tolist(),
            "seen_by": [name for name in earlier if set(stages[name]["places"]) & set(stages[stage]["places"])],
        },
    )


class RecordProgress(TrainerCallback):
    """Writes a stage's progress to ``run.json`` whenever a checkpoint is saved."""

    def __init__(self, out: Path, stage: str, trainer: CocoaTrainer) -> None:
        self.out, self.stage, self.trainer = out, stage, trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record step, seconds and log lines."""
        if state.is_world_process_zero:
            update_stage(
                self.out, self.stage, step=state.global_step, seconds=self.trainer.seconds(), log=state.log_history
            )


def finished_stages(recipe: Recipe, out: Path) -> list[StageResult]:
    """Return the results of the finished stages of an interrupted run.

    :raises CocoaError: If the weights or the record of one are broken or missing.
    """
    results, stages = [], read_run(out)["stages"]
    for stage in recipe.stages:
        folder, entry = out / stage, stages[stage]
        if not (entry["finished"] and (folder / TRAINING_FILE).is_file()):
            break
        read_training(folder)
        rows = sum(entry["rows"].values())
        results.append(StageResult(stage, folder, entry["step"], rows, entry["seconds"], entry["log"], entry["facts"]))
    return results


def write_record(recipe: Recipe, start: Start, results: Sequence[StageResult]) -> None:
    """Write the training record of the last stage's checkpoint, which marks the checkpoint as complete."""
    names = {each.stage: dict.fromkeys(map(_name, recipe.sources_of(each.stage).values())) for each in results}
    data = [f"{each.stage}: {each.rows} rows of {', '.join(names[each.stage])}" for each in results]
    folder = results[-1].folder
    run = run_of(folder)
    record = {
        "run": run and read_run(run)["id"],
        "backbone": start.backbone,
        "origin": start.origin,
        "recipe": recipe.model_dump(mode="json"),
        "stages": start.stages + [_stage_record(recipe, result) for result in results],
        "data": "; ".join(start.data + data),
    }
    write_training(folder, record)


def _stage_record(recipe: Recipe, result: StageResult) -> dict[str, Any]:
    settings = recipe.stages[result.stage].settings
    return {
        "stage": result.stage,
        "steps": result.steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "adapter": None if settings.adapter is None else settings.adapter.model_dump(mode="json"),
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "final": result.final,
        **result.facts,
    }
