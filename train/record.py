"""What a checkpoint knows of its making: the recipe, and every stage that its weights have been through."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_embed.backbone import Origin, origin
from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.export import TRAINING_FILE, read_training
from cocoa_embed.train.checkpoints import write_json
from cocoa_embed.train.recipe import SOURCE_KINDS, Recipe

LOG_FILE = "log.json"


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind.

    :param folder: Its checkpoint.
    :param rows: How many rows it drew from.
    :param seconds: Wall-clock time of its training loop.
    :param log: Its log lines: ``step`` and the figures of that step.
    """

    stage: str
    folder: Path
    steps: int
    rows: int
    seconds: float
    log: list[dict[str, float]]

    @property
    def final(self) -> dict[str, float]:
        """The last logged figure of each name."""
        return {name: value for line in self.log for name, value in line.items()}


def read_result(stage: str, folder: Path) -> StageResult | None:
    """Return the result of a finished stage from its checkpoint; None where it is not finished.

    :raises CocoaError: If its record or its log is broken.
    """
    if not (folder / TRAINING_FILE).is_file():
        return None
    training = read_training(folder)
    try:
        record = training["stages"][-1]
        return StageResult(
            stage, folder, record["steps"], record["rows"], record["seconds"], _read_log(folder / LOG_FILE)
        )
    except (LookupError, TypeError) as error:
        raise CocoaError(
            f"{printable(folder / TRAINING_FILE)} says nothing of the stage's steps, rows and seconds; it is broken"
        ) from error


def _read_log(file: Path) -> list[dict[str, float]]:
    """Read a stage's log.

    :raises CocoaError: If it is missing or broken.
    """
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(f"{printable(file)} cannot be read ({one_line(error)}); the stage's log is broken") from error
    if not isinstance(lines, list) or not all(isinstance(line, dict) and "step" in line for line in lines):
        raise CocoaError(f"{printable(file)} is no list of log lines, each with its step; the stage's log is broken")
    return lines


@dataclass(frozen=True)
class Start:
    """Where a run begins: the backbone that its weights are from, and the stages they have been through already."""

    backbone: str
    origin: Origin
    stages: list[dict[str, Any]]
    data: list[str]


def read_start(name_or_path: str) -> Start:
    """Read where the recipe's ``backbone`` is from; a checkpoint of an earlier run knows its own.

    :raises CocoaError: If its record is broken.
    """
    if (Path(name_or_path) / TRAINING_FILE).is_file():
        earlier = read_training(Path(name_or_path))
        data = [earlier["data"]] if "data" in earlier else []
        return Start(earlier["backbone"], earlier["origin"], earlier["stages"], data)
    return Start(name_or_path, origin(name_or_path), [], [])


def write_record(recipe: Recipe, start: Start, results: Sequence[StageResult]) -> None:
    """Write log and record of the last stage into its checkpoint; the record comes last and says that all is there."""
    record = {
        "backbone": start.backbone,
        "origin": start.origin,
        "recipe": recipe.model_dump(mode="json"),
        "stages": start.stages + [_stage_record(recipe, result) for result in results],
        "data": "; ".join(start.data + [f"{r.stage}: {r.rows} rows of {_sources(recipe, r.stage)}" for r in results]),
    }
    folder = results[-1].folder
    write_json(folder / LOG_FILE, results[-1].log)
    write_json(folder / TRAINING_FILE, record)


def _sources(recipe: Recipe, stage: str) -> str:
    """Return the names of a stage's sources, each once, for the model card."""
    named = [
        next(str(given) for kind in SOURCE_KINDS if (given := getattr(source, kind)) is not None)
        for source in recipe.sources_of(stage).values()
    ]
    return ", ".join(dict.fromkeys(named))


def _stage_record(recipe: Recipe, result: StageResult) -> dict[str, Any]:
    section = recipe.section(result.stage)
    return {
        "stage": result.stage,
        "steps": result.steps,
        "batch_size": section.batch_size,
        "learning_rate": section.learning_rate,
        "adapter": None if section.adapter is None else section.adapter.model_dump(mode="json"),
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "final": result.final,
    }
