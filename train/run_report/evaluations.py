"""Results of ``cocoa-embed eval`` in the report of a run: of its own model, or of another to compare it with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.evaluation.pairs_tables import directions_table, pairs_tables
from cocoa_embed.model.training_record import TRAINING_FILE, read_training
from cocoa_embed.report.content import Evaluation, Headline
from cocoa_embed.report.tables import Table
from cocoa_embed.train.run_report.finished_run import FinishedRun
from cocoa_embed.train.run_report.scores import UNTOLD, direction_headlines, seen_in_training

EVALUATIONS = "eval"
"""The folder of a run whose results of ``cocoa-embed eval`` are shown without asking."""

MMEB = "MMEB-V1"


class _PairsData(NamedTuple):
    path: Path
    images: Path | None
    columns: dict[str, str]


@dataclass(frozen=True)
class GivenEvaluations:
    """What was read of files: tables, what to put first, and what could not be read."""

    evaluations: list[Evaluation] = field(default_factory=list)
    headlines: list[Headline] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)


def given_evaluations(run: FinishedRun, files: Sequence[Path]) -> GivenEvaluations:
    """Read ``files`` and the results in the run's own folder.

    :raises CocoaError: If one of ``files`` cannot be used; of the run's own, that is an alert.
    """
    found = GivenEvaluations()
    named = {file.resolve() for file in files}
    own = [file for file in sorted((run.folder / EVALUATIONS).glob("*.json")) if file.resolve() not in named]
    for file in [*files, *own]:
        try:
            evaluation, headlines = read_evaluation(file, run)
        except CocoaError as error:
            if file in files:
                raise
            found.alerts.append(f"Left out: {error}.")
        else:
            found.evaluations.append(evaluation)
            found.headlines.extend(headlines)
    return found


def read_evaluation(file: Path, run: FinishedRun) -> tuple[Evaluation, list[Headline]]:
    """Read what ``cocoa-embed eval mmeb`` or ``eval pairs`` has written as JSON.

    There are headlines of the run's models alone, and of pairs only where none is known to have been trained on.

    :raises CocoaError: If it is something else.
    """
    name = printable(file)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        kind, model = document["benchmark"], str(document["model"])
        tables, headlines = _TABLES[kind](document), _HEADLINES[kind](document)
        data = _pairs_data(document)
    except OSError as error:
        raise CocoaError(f"{name} cannot be read ({one_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CocoaError(
            f"{name} is no result of cocoa-embed eval; give a pairs.json or mmeb.json that it has written"
        ) from error
    what = MMEB if kind == MMEB else "Pairs"
    if not is_of_run(model, run):
        note = f"{what}, from {name}. That this model is of this run cannot be told from its name."
        return Evaluation(f"Another model: {model}", note, tables), []
    remark, held_out = ("", True) if kind == MMEB else _seen_in_training(data, run)
    if held_out is False:
        headlines = []
    elif held_out is None:
        headlines = [replace(headline, detail=f"{headline.detail} {UNTOLD}") for headline in headlines]
    return Evaluation(f"{what}: {model}", f"From {name}. {remark}".rstrip(), tables), headlines


def is_of_run(model: str, run: FinishedRun) -> bool:
    """Tell whether a model, as a result names it, is in the run's folder or an export of one of its checkpoints."""
    try:
        folder = Path(model).expanduser().resolve()
        if folder.is_relative_to(run.folder.resolve()):
            return True
        if not (folder / TRAINING_FILE).is_file():
            return False
        exported = read_training(folder)
    except (CocoaError, OSError, RuntimeError, ValueError):  # a name need not be a path
        return False
    # Weights of earlier stages may have been removed to save disk, records too.
    there = [result.folder for result in run.results if (result.folder / TRAINING_FILE).is_file()]
    checkpoints = [read_training(each, needs_weights=False) for each in there]
    return any(all(each[key] == exported[key] for key in ("recipe", "stages")) for each in checkpoints)


def _pairs_tables(document: Mapping[str, Any]) -> list[Table]:
    return pairs_tables(document) if "other" in document else [directions_table(document)]


def _pairs_headlines(document: dict[str, Any]) -> list[Headline]:
    return direction_headlines(document, f"{document['model']}.")


def _mmeb_headlines(document: dict[str, Any]) -> list[Headline]:
    covered, mean = document["coverage"]["overall"], document["averages"]["overall"]
    if mean is None:
        return []
    part = "" if covered["complete"] else f" Not complete: {covered['run']} of {covered['of']} subsets."
    return [Headline(MMEB, f"{100 * mean:.1f} %", "precision@1, the mean over subsets", f"{document['model']}.{part}")]


_TABLES: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {MMEB: mmeb_tables, "pairs": _pairs_tables}
_HEADLINES: dict[str, Callable[[dict[str, Any]], list[Headline]]] = {MMEB: _mmeb_headlines, "pairs": _pairs_headlines}


def _pairs_data(document: Mapping[str, Any]) -> _PairsData | None:
    """Return where the pairs of a result are from; None of one that does not tell it."""
    if "data" not in document:
        return None
    data = document["data"]
    return _PairsData(
        Path(data["path"]),
        data["images"] and Path(data["images"]),
        {part: name for part, name in data["columns"].items() if name},
    )


def _seen_in_training(data: _PairsData | None, run: FinishedRun) -> tuple[str, bool | None]:
    """Return what to say of the pairs of a result, and whether the run was trained on none; None if unknown."""
    if data is None:
        return "Which pairs these are, the file does not tell.", None
    what = f"The pairs are those of {printable(data.path)}."
    try:
        pairs = read_pairs(data.path, data.images, data.columns)
    except (CocoaError, OSError, ValueError) as error:  # the path may be another machine's
        return f"{what} They cannot be read any more ({one_line(error).rstrip('.')}).", None
    note, held_out = seen_in_training(run, pairs)
    return f"{what} {note}", held_out
