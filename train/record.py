"""What a checkpoint knows of its making: the recipe, and every stage that its weights have been through."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.model.backbone import Origin, origin
from cocoa_embed.model.training_record import TRAINING_FILE, read_training
from cocoa_embed.train.loop.checkpoints import write_json
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.settings import SOURCE_KINDS

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


def read_result(stage: str, folder: Path, *, needs_weights: bool = True) -> StageResult | None:
    """Return the result of a finished stage from its checkpoint; None where it is not finished.

    :param needs_weights: Its weights are to be there too.
    :raises CocoaError: If its record or its log is broken, or its weights are not there.
    """
    if not (folder / TRAINING_FILE).is_file():
        return None
    training = read_training(folder, needs_weights=needs_weights)
    try:
        record = training["stages"][-1]
        return recorded_result(stage, folder, record, read_log(folder / LOG_FILE, stage))
    except (LookupError, TypeError) as error:
        raise CocoaError(
            f"{printable(folder / TRAINING_FILE)} says nothing of the stage's steps, rows and seconds; it is broken, "
            "restore it"
        ) from error


def recorded_result(
    stage: str, folder: Path, record: Mapping[str, Any], log: list[dict[str, float]] | None = None
) -> StageResult:
    """Return the result of a stage from what a record says of it.

    :param log: Its log lines, where there are any left.
    :raises LookupError: If the record does not say it.
    :raises TypeError: If what it says is no number.
    """
    steps, rows, seconds = (record[name] for name in ("steps", "rows", "seconds"))
    if not (_is_whole(steps) and _is_whole(rows) and _is_number(seconds)):
        raise TypeError(f"steps {steps!r}, rows {rows!r} and seconds {seconds!r} are to be numbers")
    return StageResult(stage, folder, int(steps), int(rows), seconds, log or [])


def read_log(file: Path, stage: str) -> list[dict[str, float]]:
    """Read a stage's log.

    :raises CocoaError: If it is missing or broken.
    """
    name = printable(file)
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(
            f"{name} cannot be read ({one_line(error)}); the log of stage {stage} is broken. {_WITHOUT_LOG}"
        ) from error
    return checked_log(lines, name, stage, _WITHOUT_LOG)


_WITHOUT_LOG = "Restore it, or write [] into it to go on without the stage's curves."


def checked_log(lines: object, name: str, stage: str, remedy: str) -> list[dict[str, float]]:
    """Return log lines as they are.

    :param name: What they are read from, for errors.
    :param remedy: What to do about it.
    :raises CocoaError: If they are no list of objects, each with its step, whose values are numbers.
    """
    if not isinstance(lines, list) or not all(isinstance(line, dict) and "step" in line for line in lines):
        raise CocoaError(
            f"{name} is no list of log lines, each with its step; the log of stage {stage} is broken. {remedy}"
        )
    for number, line in enumerate(lines, 1):
        for key, value in line.items():
            if not (_is_whole(value) if key == "step" else _is_number(value)):
                kind = "a whole number" if key == "step" else "a number"
                raise CocoaError(
                    f"{name}, line {number} of stage {stage}: {key} is {json.dumps(value)[:40]}, {kind} is expected; "
                    f"the log is broken. {remedy}"
                )
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


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
    stage = recipe.stages[result.stage]
    section = stage.settings
    return {
        "stage": result.stage,
        "steps": result.steps,
        "batch_size": section.batch_size,
        "learning_rate": section.learning_rate,
        "adapter": None if section.adapter is None else section.adapter.model_dump(mode="json"),
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "final": result.final,
        **stage.facts(),
    }
