"""The folder of a training run, read back: its recipe, its data, and the stages that are finished."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.export import TRAINING_FILE
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.train.checkpoints import newest_complete, step_of
from cocoa_embed.train.data import BadRow
from cocoa_embed.train.preparation import BAD_ROWS_FILE, CHECKPOINTS, DATA_FILE, RECIPE_FILE
from cocoa_embed.train.recipe import STAGES, Recipe
from cocoa_embed.train.record import StageResult, read_result
from cocoa_embed.train.sections import DataSection, SourceSection


@dataclass(frozen=True)
class StageRows:
    """The rows of a stage.

    :param counts: How many are of each subset.
    :param sources: Where each subset is from; None where a run of an earlier version does not tell.
    :param fingerprint: As :func:`cocoa_embed.train.mixing.fingerprint` made it.
    """

    counts: dict[str, int]
    sources: dict[str, SourceSection] | None
    fingerprint: str


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left behind, as far as it has got.

    :param recipe: Its recipe's values, every key of each section given.
    :param results: Of the stages that are finished.
    :param missing: The stages that are not, and the step of their newest checkpoint to resume from, 0 without one.
    :param rows: By stage.
    :param bad: The rows that were left out.
    """

    folder: Path
    recipe: dict[str, Any]
    results: list[StageResult]
    missing: dict[str, int]
    rows: dict[str, StageRows]
    bad: list[BadRow]

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe asks for."""
        return stages_of(self.recipe)


def stages_of(recipe: Mapping[str, Any]) -> list[str]:
    """Return the stages that a recipe's values ask for, in their order."""
    return [stage for stage in STAGES if recipe.get(stage)]


def read_run(folder: Path) -> FinishedRun:
    """Read the folder of a run, which may be under way.

    :raises UsageError: If it is no run.
    :raises CocoaError: If a file of it is broken.
    """
    _refuse_other_folders(folder)
    recipe = _read_mapping(folder / RECIPE_FILE)
    results, missing = [], {}
    for stage in stages_of(recipe):
        result = read_result(stage, folder / stage)
        if result is None:
            checkpoint = newest_complete(folder / CHECKPOINTS / stage)
            missing[stage] = 0 if checkpoint is None else step_of(checkpoint)
        else:
            results.append(result)
    return FinishedRun(folder, recipe, results, missing, _read_rows(folder, recipe), _read_bad_rows(folder))


def _refuse_other_folders(folder: Path) -> None:
    name = printable(folder)
    if not folder.is_dir():
        raise UsageError(
            f"{name} {'is a file' if folder.exists() else 'does not exist'}; name the folder of a training run, the"
            " --out of cocoa-embed train"
        )
    if (folder / RECIPE_FILE).is_file():
        return
    if (folder / TRAINING_FILE).is_file():
        above = folder.resolve().parent
        remedy = f"name the run, {printable(above)}" if (above / RUN_MARKER).is_file() else "name a training run"
        raise UsageError(f"{name} is a single model, not a run; {remedy}")
    inside = sorted(marker.parent for depth in ("*", "*/*") for marker in folder.glob(f"{depth}/{RUN_MARKER}"))
    hint = f"; did you mean {printable(inside[0])}?" if inside else "; name the --out of cocoa-embed train"
    raise UsageError(f"{name} is no training run: it has no {RECIPE_FILE}{hint}")


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(f"{printable(file)} cannot be read ({one_line(error)}); the run's folder is broken") from error
    if not isinstance(document, dict):
        raise CocoaError(f"{printable(file)} is no JSON object; the run's folder is broken")
    return document


def _read_rows(folder: Path, recipe: Mapping[str, Any]) -> dict[str, StageRows]:
    file = folder / DATA_FILE
    try:
        return {
            stage: StageRows(known["rows"], _sources(known, recipe, stage), known["fingerprint"])
            for stage, known in _read_mapping(file).items()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CocoaError(f"{printable(file)} is not as a run writes it ({one_line(error)})") from error


def _sources(known: Mapping[str, Any], recipe: Mapping[str, Any], stage: str) -> dict[str, SourceSection] | None:
    if "sources" in known:
        return {name: SourceSection(**values) for name, values in known["sources"].items()}
    try:
        return Recipe.parse(without_defaults(recipe)).sources_of(stage)
    except UsageError:
        return None


def without_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a written recipe's values without those of its data sections that are as by default.

    In a written recipe every key is given, and in a data section what is given replaces what the recipe's own says.
    What was given its default on purpose is lost.
    """
    defaults = DataSection().model_dump(mode="json")

    def given(data: Mapping[str, Any]) -> dict[str, Any]:
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
        return [BadRow(line["subset"], line["source"], line["reason"]) for line in lines]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CocoaError(f"{printable(file)} cannot be read ({one_line(error)})") from error
