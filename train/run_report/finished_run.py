"""The folder of a training run, read back: its recipe, its data, and the stages that are finished."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.model.training_record import TRAINING_FILE, read_training
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.loop.checkpoints import newest_complete, read_complete, step_of
from cocoa_embed.train.plan.checks import BAD_ROWS_FILE, CHECKPOINTS, DATA_FILE, RECIPE_FILE
from cocoa_embed.train.recipe import STAGES, Recipe
from cocoa_embed.train.record import StageResult, checked_log, read_result, recorded_result
from cocoa_embed.train.settings import SOURCE_KINDS, DataSettings, SourceSettings


@dataclass(frozen=True)
class StageRows:
    """The rows of a stage.

    :param counts: How many are of each subset.
    :param sources: Where each subset is from; None where a run of an earlier version does not tell.
    :param fingerprint: As ``fingerprint`` made it.
    """

    counts: dict[str, int]
    sources: dict[str, SourceSettings] | None
    fingerprint: str


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left behind, as far as it has got.

    :param recipe: Its recipe's values, every key of each section given.
    :param results: Of the stages that are finished.
    :param missing: The stages that are not, and the step of their newest checkpoint to resume from, 0 without one.
    :param rows: By stage.
    :param bad: The rows that were left out.
    :param gone: Of the finished stages those whose own record has gone, as a later one tells of them: their log is one
        line, the last figure of each name.
    :param unfinished: How far the stages in ``missing`` are that have a checkpoint to resume from, as it tells.
    """

    folder: Path
    recipe: dict[str, Any]
    results: list[StageResult]
    missing: dict[str, int]
    rows: dict[str, StageRows]
    bad: list[BadRow]
    gone: list[str] = field(default_factory=list)
    unfinished: list[StageResult] = field(default_factory=list)

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe asks for."""
        return stages_of(self.recipe)

    def bad_of(self, stage: str) -> list[BadRow]:
        """Return the rows that a stage has left out; a run of an earlier version does not tell which stage it was."""
        return [row for row in self.bad if not row.stages or stage in row.stages]


def stages_of(recipe: Mapping[str, Any]) -> list[str]:
    """Return the stages that a recipe's values ask for, in their order."""
    return [stage for stage in STAGES if recipe.get(stage)]


def read_run(folder: Path) -> FinishedRun:
    """Read the folder of a run, which may be under way, or lack what was removed to save disk.

    :raises UsageError: If it is no run.
    :raises CocoaError: If a file of it is broken.
    """
    _refuse_other_folders(folder)
    recipe = _read_recipe(folder / RECIPE_FILE)
    rows = read_stage_rows(folder, recipe)
    stages = stages_of(recipe)
    found = {stage: read_result(stage, folder / stage, needs_weights=False) for stage in stages}
    gone = {stage: result for stage, result in _told_by_later(folder, stages, found).items() if found[stage] is None}
    found |= gone
    missing, unfinished = {}, []
    for stage in [stage for stage, result in found.items() if result is None]:
        result = _reached(folder, stage, rows)
        missing[stage] = 0 if result is None else result.steps
        unfinished += [] if result is None else [result]
    results = [result for result in found.values() if result is not None]
    return FinishedRun(folder, recipe, results, missing, rows, _read_bad_rows(folder), list(gone), unfinished)


def _told_by_later(
    folder: Path, stages: Sequence[str], found: Mapping[str, StageResult | None]
) -> dict[str, StageResult]:
    """Return what the record of a run's last finished stage says of the stages before it."""
    last = next((stage for stage in reversed(stages) if found[stage] is not None), None)
    if last is None:
        return {}
    before = stages[: stages.index(last)]
    record = folder / last / TRAINING_FILE
    try:
        # Before the run's own stages, those that its backbone had been through.
        told = read_training(record.parent, needs_weights=False)["stages"][:-1][-len(before) or None :]
        named = {entry["stage"]: entry for entry in told}
        return {
            stage: recorded_result(stage, folder / stage, named[stage], _last_line(named[stage], record))
            for stage in before
            if stage in named
        }
    except (LookupError, TypeError) as error:
        raise CocoaError(
            f"{printable(record)} says nothing of the stages before {last} ({one_line(error)}); it is broken, "
            "restore it"
        ) from error


def _last_line(told: Mapping[str, Any], record: Path) -> list[dict[str, float]]:
    if not told.get("final"):
        return []
    return checked_log([told["final"]], printable(record), told["stage"], "Restore it.")


def _reached(folder: Path, stage: str, rows: Mapping[str, StageRows]) -> StageResult | None:
    """Return how far a stage is by its newest checkpoint to resume from; None without one."""
    checkpoints = folder / CHECKPOINTS / stage
    try:
        checkpoint = newest_complete(checkpoints)
        if checkpoint is None:
            return None
        file = checkpoint / TRAINER_STATE_NAME
        if not file.is_file():
            return None  # it has been replaced by a newer one meanwhile
        lines = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        log = checked_log(lines, printable(file), stage, _WITHOUT_CHECKPOINT)
        seconds = float(read_complete(checkpoint)["seconds"])
        return StageResult(stage, folder / stage, step_of(checkpoint), _count(rows, stage), seconds, log)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CocoaError(
            f"The newest checkpoint of stage {stage} in {printable(checkpoints)} cannot be read ({one_line(error)}). "
            f"{_WITHOUT_CHECKPOINT}"
        ) from error


_WITHOUT_CHECKPOINT = "Remove that checkpoint to go on without it."


def _count(rows: Mapping[str, StageRows], stage: str) -> int:
    return sum(rows[stage].counts.values()) if stage in rows else 0


def run_of(folder: Path) -> Path | None:
    """Return the run that the folder of a stage, or of weights kept on the way through one, is in; None in none."""
    return next((parent for parent in folder.resolve().parents[:2] if (parent / RUN_MARKER).is_file()), None)


def _refuse_other_folders(folder: Path) -> None:
    name = printable(folder)
    if not folder.is_dir():
        raise UsageError(
            f"{name} {'is a file' if folder.exists() else 'does not exist'}; name the folder of a training run, the"
            " --out of cocoa-embed train"
        )
    if (folder / RECIPE_FILE).is_file():
        return
    run = run_of(folder)
    if run is not None or (folder / TRAINING_FILE).is_file():
        kind = "is a single model, not a run" if (folder / TRAINING_FILE).is_file() else "is part of a run"
        raise UsageError(f"{name} {kind}; {f'name the run, {printable(run)}' if run else 'name a training run'}")
    inside = sorted(marker.parent for depth in ("*", "*/*") for marker in folder.glob(f"{depth}/{RUN_MARKER}"))
    hint = f"; did you mean {printable(inside[0])}?" if inside else "; name the --out of cocoa-embed train"
    raise UsageError(f"{name} is no training run: it has no {RECIPE_FILE}{hint}")


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(
            f"{printable(file)} cannot be read ({one_line(error)}); the run's folder is broken, restore the file"
        ) from error
    if not isinstance(document, dict):
        raise CocoaError(f"{printable(file)} is no JSON object; the run's folder is broken, restore the file")
    return document


def _read_recipe(file: Path) -> dict[str, Any]:
    """Read a recipe's values, whose sections are objects."""
    recipe = _read_mapping(file)
    sections = {key: recipe.get(key) for key in (*STAGES, "data", "prompts")}
    sections |= {f"{stage}.data": recipe[stage].get("data") for stage in STAGES if isinstance(recipe.get(stage), dict)}
    for name, section in sections.items():
        if not isinstance(section, dict | None):
            raise CocoaError(
                f"{printable(file)}: {name} is {json.dumps(section)[:40]}, an object is expected; the run's folder is "
                "broken, restore the file"
            )
    return recipe


def read_stage_rows(folder: Path, recipe: Mapping[str, Any] | None = None) -> dict[str, StageRows]:
    """Return what a run has written down of its stages' rows.

    :param recipe: The run's recipe, which may tell where rows are from if nothing else does.
    :raises CocoaError: If the file is broken.
    """
    file, recipe = folder / DATA_FILE, {} if recipe is None else recipe
    return {stage: _stage_rows(file, stage, known, recipe) for stage, known in _read_mapping(file).items()}


def _stage_rows(file: Path, stage: str, known: object, recipe: Mapping[str, Any]) -> StageRows:
    try:
        if not isinstance(known, dict):
            raise TypeError(f"{json.dumps(known)[:40]} stands where an object is expected")
        counts, digest = known["rows"], known["fingerprint"]
        if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
            raise TypeError(f"rows is {json.dumps(counts)[:40]}, a number for each subset is expected")
        if not isinstance(digest, str):
            raise TypeError(f"fingerprint is {json.dumps(digest)[:40]}, a text is expected")
        return StageRows(counts, _sources(known, recipe, stage), digest)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CocoaError(
            f"{printable(file)} is not as a run writes it: stage {stage}, {one_line(error)}. Restore it, or write {{}} "
            "into it to go on without the rows."
        ) from error


def _sources(known: Mapping[str, Any], recipe: Mapping[str, Any], stage: str) -> dict[str, SourceSettings] | None:
    if "sources" in known:
        return {name: SourceSettings(**values) for name, values in known["sources"].items()}
    try:
        return Recipe.parse(without_defaults(recipe)).sources_of(stage)
    except UsageError:
        return None


def without_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a written recipe's values, without those that nobody has given to its data sections.

    Earlier versions wrote every key of a data section down, and in one what is given replaces what the recipe's own
    says: of such sections the values that are as by default are left out, those that were given on purpose too.
    """
    defaults = {name: known.default for name, known in DataSettings.model_fields.items()}

    def given(data: Mapping[str, Any]) -> dict[str, Any]:
        if not all(kind in data for kind in SOURCE_KINDS):
            return dict(data)  # as it was given: nobody names every kind of source
        return {key: value for key, value in data.items() if value != defaults.get(key)}

    pruned = dict(recipe)
    if pruned.get("data"):
        pruned["data"] = given(pruned["data"])
    for stage in stages_of(recipe):
        if pruned[stage].get("data"):
            pruned[stage] = {**pruned[stage], "data": given(pruned[stage]["data"])}
    return pruned


def _read_bad_rows(folder: Path) -> list[BadRow]:
    file = folder / BAD_ROWS_FILE
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [_bad_row(line) for line in lines]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CocoaError(
            f"{printable(file)} cannot be read ({one_line(error)}); restore it, or remove it to go on without the rows "
            "that were left out"
        ) from error


def _bad_row(line: Mapping[str, Any]) -> BadRow:
    parts, stages = [line[key] for key in ("subset", "source", "reason")], line.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(each, str) for each in (*parts, *stages)):
        raise TypeError(f"{json.dumps(line)[:60]} is no row that was left out")
    subset, source, reason = parts
    return BadRow(subset, source, reason, tuple(stages))
