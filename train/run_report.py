"""What the report of a training run shows: everything in its folder, and the scores of its model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cocoa_embed import __version__
from cocoa_embed.errors import CocoaError, UsageError, one_line, printable, require
from cocoa_embed.evaluation.finished import make_folder, write_result
from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
from cocoa_embed.evaluation.pairs_tables import directions_table, pairs_tables, title_of
from cocoa_embed.evaluation.tables import Table
from cocoa_embed.export import read_training
from cocoa_embed.report.content import Curve, DataUsed, Evaluation, Headline, RunReport, StageData
from cocoa_embed.report.figures import GEOMETRY, NO_IMAGE, PLATEAU, duration
from cocoa_embed.report.page import render_report
from cocoa_embed.train.finished_run import FinishedRun, read_run
from cocoa_embed.train.recipe_table import recipe_table, source_words
from cocoa_embed.train.record import StageResult
from cocoa_embed.train.run_scores import RunScores, direction_headlines, given_pairs, own_pairs, score_run
from cocoa_embed.train.samples import Samples, read_samples

STAGE_TITLES = {"warmup": "warm-up", "bridge": "bridge", "contrastive": "contrastive"}

DRAWN = ("loss", "mntp_loss", "mae_loss", "hidden_token_accuracy", *PLATEAU, NO_IMAGE, *GEOMETRY)
"""What is drawn of a stage's log."""

EVALUATIONS = "eval"
"""The folder of a run whose results of ``cocoa-embed eval`` are shown without asking."""

REPORT_FILE = "report.html"
SHOWN_BAD_ROWS = 12

KEPT_OUT = "These rows were kept out of the stage: it was not trained on them."
TRAINED_ON = "The stage was trained on these rows, so they show what it has learned, and not how it does on others."


@dataclass(frozen=True)
class Asked:
    """What is to be in a report beside the run's own folder.

    :param pairs: What to score the model on; by default rows that it was trained on.
    :param images: Where the paths of a table of pairs start.
    :param evaluations: Results of ``cocoa-embed eval``, beside those in the run's folder.
    """

    pairs: Path | None = None
    images: Path | None = None
    evaluations: Sequence[Path] = ()
    device: str | None = None
    progress: bool = False
    tell: Callable[[str], None] | None = field(default=None)


def write_run_report(folder: Path, asked: Asked, out: Path | None = None) -> Path:
    """Write the report of the run in ``folder``; by default into it.

    :returns: The page.
    :raises CocoaError: As :func:`run_report` does, or if the page cannot be written.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, "report")
    run = read_run(folder)
    page = out or folder / REPORT_FILE
    if page.is_dir():
        raise UsageError(f"{printable(page)} is a folder; give --out the name of a file")
    make_folder(page.parent)  # first, as scoring takes a while
    write_result(page, render_report(run_report(run, asked)))
    return page


def run_report(run: FinishedRun, asked: Asked) -> RunReport:
    """Return the report of a run.

    What was asked for and cannot be had is an error. What the run's folder lacks, or its own data, is left out, and
    the page says so.

    :raises CocoaError: If a file of the run is broken, or what was asked for cannot be used.
    """
    alerts = _missing_stages(run)
    evaluations, headlines = _given_evaluations(run, asked, alerts)
    samples = {result.stage: read_samples(result.folder) for result in run.results}
    report = RunReport(
        title=str(run.recipe.get("name") or run.folder.name),
        subtitle=_subtitle(run),
        facts=_facts(run),
        curves=stage_curves(run.results),
        recipe=recipe_table(run),
        data=_data(run),
        command="cocoa-embed report",
        **_samples(run, samples, alerts),
    )
    scores = _scores(run, asked, alerts)
    if scores is not None:
        evaluations = [_scored(scores), *evaluations]
        headlines = [*_scored_headlines(scores), *headlines]
        report = replace(report, galleries=scores.galleries)
    return replace(report, evaluations=evaluations, headlines=headlines, alerts=alerts)


def stage_curves(results: Sequence[StageResult]) -> list[Curve]:
    """Return what is drawn of each stage's log."""
    return [stage_curve(STAGE_TITLES[result.stage], result) for result in results]


def stage_curve(title: str, result: StageResult) -> Curve:
    """Return what is drawn of a stage's log under a title of its own."""
    series = {name: [(int(line["step"]), line[name]) for line in result.log if name in line] for name in DRAWN}
    return Curve(title, {name: points for name, points in series.items() if points}, result.seconds)


def _subtitle(run: FinishedRun) -> str:
    stages = [STAGE_TITLES[result.stage] for result in run.results]
    if not stages:
        return f"A run from {run.recipe.get('backbone')} that has not finished a stage yet."
    seconds = sum(result.seconds for result in run.results)
    listed = " and ".join(filter(None, [", ".join(stages[:-1]), stages[-1]]))
    return f"Trained from {run.recipe.get('backbone')}: {listed}, in {duration(seconds)}."


def _missing_stages(run: FinishedRun) -> list[str]:
    alerts = []
    for stage, step in run.missing.items():
        reached = f"; its newest checkpoint is of step {step:,}" if step else ""
        alerts.append(f"The {STAGE_TITLES[stage]} stage is not finished{reached}. What it would show is missing here.")
    return alerts


def _facts(run: FinishedRun) -> list[tuple[str, str]]:
    facts = [("run", printable(run.folder))]
    if run.results:
        training = read_training(run.results[-1].folder)
        facts += [("backbone", str(training["backbone"])), ("origin", str(training["origin"]))]
        before = training["stages"][: -len(run.results)]
        if before:
            named = [f"{STAGE_TITLES.get(stage['stage'], stage['stage'])} ({stage['steps']} steps)" for stage in before]
            facts.append(("trained before this run", ", ".join(named)))
    for result in run.results:
        facts.append((f"{STAGE_TITLES[result.stage]}", f"{result.steps:,} steps in {duration(result.seconds)}"))
    for result in run.results:
        final = result.final
        told = [f"loss {final['loss']:.3g}"] if "loss" in final else []
        told += [f"{final['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in final else []
        told += [f"{final['mfu']:.0%} of the device's FLOP/s"] if "mfu" in final else []
        facts.append((f"{STAGE_TITLES[result.stage]}, at the end", ", ".join(told) or "–"))
    return [*facts, ("report by", f"cocoa-embed {__version__}")]


def _data(run: FinishedRun) -> DataUsed | None:
    stages = [
        StageData(
            STAGE_TITLES[stage],
            [
                (name, source_words(known.sources[name]) if known.sources and name in known.sources else "–", count)
                for name, count in known.counts.items()
            ],
            known.fingerprint,
        )
        for stage, known in run.rows.items()
        if stage in STAGE_TITLES
    ]
    shown = [(row.subset, printable(row.source), row.reason) for row in run.bad[:SHOWN_BAD_ROWS]]
    return DataUsed(stages, len(run.bad), shown) if stages else None


def _samples(run: FinishedRun, samples: Mapping[str, Samples | None], alerts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"patches": [], "tokens": [], "bridge_mask": None, "sample_notes": {}}
    for stage in ("warmup", "bridge"):
        of_stage, title = samples.get(stage), STAGE_TITLES[stage]
        if of_stage is None:
            if stage in samples:
                alerts.append(f"The {title} stage left no samples behind; runs begun with this version do.")
            continue
        if of_stage.failure is not None:
            alerts.append(f"The {title} stage could not leave samples behind: {of_stage.failure}.")
            continue
        found["patches"] += of_stage.patches
        found["tokens"] += of_stage.tokens
        found["bridge_mask"] = found["bridge_mask"] or of_stage.mask
        found["sample_notes"][title] = KEPT_OUT if of_stage.kept_out else TRAINED_ON
    return found


def _scores(run: FinishedRun, asked: Asked, alerts: list[str]) -> RunScores | None:
    if not run.results:
        if asked.pairs is not None:
            raise UsageError(f"{printable(run.folder)} has no finished stage, so there is no model to score on --pairs")
        return None
    if asked.pairs is not None:
        return score_run(run, given_pairs(asked.pairs, asked.images), asked.device, progress=asked.progress)
    if asked.images is not None:
        raise UsageError("--images says where the images of --pairs are; give --pairs too, or leave it out")
    try:
        scored = own_pairs(run, asked.tell)
        return score_run(run, scored, asked.device, progress=asked.progress)
    except CocoaError as error:
        alerts.append(
            f"The model could not be scored on rows of its own training ({one_line(error).rstrip('.')}); there are no"
            " galleries. Give other rows with --pairs."
        )
        return None


def _stage_note(scores: RunScores) -> str:
    if scores.stage == "contrastive":
        return ""
    return (
        f"There is no finished contrastive stage: this is the {STAGE_TITLES[scores.stage]} stage's model, which has not"
        " been trained to retrieve."
    )


def _scored(scores: RunScores) -> Evaluation:
    table = directions_table(scores.document)
    note = " ".join(filter(None, [_stage_note(scores), scores.scored.note]))
    return Evaluation(scores.scored.title, note, [table])


def _scored_headlines(scores: RunScores) -> list[Headline]:
    of_rows = " Rows that it was trained on." if scores.scored.trained_on else ""
    by_stage = "" if scores.stage == "contrastive" else f" After the {STAGE_TITLES[scores.stage]} stage alone."
    return [
        Headline(
            title_of(way),
            f"{100 * recall:.1f} %",
            "of right answers are in first place",
            f"recall@1 among {documents:,}; {100 * low:.1f} to {100 * high:.1f} %.{of_rows}{by_stage}",
        )
        for way, recall, (low, high), documents in direction_headlines(scores.document)
    ]


def _given_evaluations(run: FinishedRun, asked: Asked, alerts: list[str]) -> tuple[list[Evaluation], list[Headline]]:
    read = [read_evaluation(file) for file in asked.evaluations]
    named = {file.resolve() for file in asked.evaluations}
    for file in sorted((run.folder / EVALUATIONS).glob("*.json")):
        if file.resolve() in named:
            continue
        try:
            read.append(read_evaluation(file))
        except CocoaError as error:
            alerts.append(f"Left out: {error}.")
    return [evaluation for evaluation, _ in read], [headline for _, each in read for headline in each]


def read_evaluation(file: Path) -> tuple[Evaluation, list[Headline]]:
    """Read what ``cocoa-embed eval mmeb`` or ``eval pairs`` has written as JSON.

    :raises CocoaError: If it is something else.
    """
    name = printable(file)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        kind = document["benchmark"]
        tables = _TABLES[kind](document)
        headlines = _mmeb_headlines(document) if kind == MMEB else []
        title = f"{kind}: {document['model']}" if kind == MMEB else f"Pairs: {document['model']}"
    except OSError as error:
        raise CocoaError(f"{name} cannot be read ({one_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CocoaError(
            f"{name} is no result of cocoa-embed eval; give a pairs.json or mmeb.json that it has written"
        ) from error
    return Evaluation(title, f"From {name}.", tables), headlines


MMEB = "MMEB-V1"


def _pairs(document: Mapping[str, Any]) -> list[Table]:
    return pairs_tables(document) if "other" in document else [directions_table(document)]


_TABLES: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {MMEB: mmeb_tables, "pairs": _pairs}


def _mmeb_headlines(document: Mapping[str, Any]) -> list[Headline]:
    covered, mean = document["coverage"]["overall"], document["averages"]["overall"]
    if mean is None:
        return []
    part = "" if covered["complete"] else f" Not complete: {covered['run']} of {covered['of']} subsets."
    return [Headline(MMEB, f"{100 * mean:.1f} %", "precision@1, the mean over subsets", f"{document['model']}.{part}")]
