"""What the report of a training run shows: everything in its folder, and the scores of its model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cocoa_embed import __version__
from cocoa_embed.errors import CocoaError, UsageError, one_line, printable, require
from cocoa_embed.evaluation.pairs_tables import directions_table
from cocoa_embed.evaluation.result_cache import make_folder, write_result
from cocoa_embed.model.training_record import is_bidirectional, read_training
from cocoa_embed.report.content import Curve, DataUsed, Evaluation, RunReport, StageData
from cocoa_embed.report.figures import duration
from cocoa_embed.report.page import render_report
from cocoa_embed.report.series import GEOMETRY, NO_IMAGE, PLATEAU, STAGE_TITLES
from cocoa_embed.train.diagnosis import find_device
from cocoa_embed.train.record import StageResult
from cocoa_embed.train.run_report.evaluations import given_evaluations
from cocoa_embed.train.run_report.finished_run import FinishedRun, read_run
from cocoa_embed.train.run_report.recipe_table import recipe_table, source_words
from cocoa_embed.train.run_report.rows import before_the_bridge, draws, earlier_stages, kept_out_images
from cocoa_embed.train.run_report.scores import (
    RunScores,
    given_pairs,
    own_pairs,
    score_headlines,
    score_run,
    stage_note,
)
from cocoa_embed.train.stages.samples import Samples, read_samples

DRAWN = ("loss", "mntp_loss", "mae_loss", "masked_token_accuracy", *PLATEAU, NO_IMAGE, *GEOMETRY)
"""What is drawn of a stage's log."""

REPORT_FILE = "report.html"
SHOWN_BAD_ROWS = 12


@dataclass(frozen=True)
class Asked:
    """What is to be in a report beside the run's own folder.

    :param pairs: What to score the model on; by default rows of the run, where it is finished.
    :param images: Where the paths of a table of pairs start.
    :param evaluations: Results of ``cocoa-embed eval``, beside those in the run's folder.
    :param scores: Score the model.
    :param batch_tokens: About the most tokens to embed at once.
    """

    pairs: Path | None = None
    images: Path | None = None
    evaluations: Sequence[Path] = ()
    device: str | None = None
    scores: bool = True
    batch_tokens: int | None = None
    progress: bool = False
    tell: Callable[[str], None] | None = field(default=None)


def write_run_report(folder: Path, asked: Asked, out: Path | None = None) -> Path:
    """Write the report of the run in ``folder``; by default into it.

    :returns: The page.
    :raises CocoaError: As ``run_report`` does, or if the page cannot be written.
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
    given = given_evaluations(run, asked.evaluations)
    alerts += given.alerts
    samples = {result.stage: read_samples(result.folder) for result in run.results}
    report = RunReport(
        title=str(run.recipe.get("name") or run.folder.resolve().name),
        subtitle=_subtitle(run),
        facts=_facts(run),
        curves=stage_curves([*run.results, *run.unfinished]),
        recipe=replace(recipe_table(run), stages=[STAGE_TITLES[stage] for stage in run.stages]),
        data=_data(run),
        evaluations=given.evaluations,
        headlines=given.headlines,
        command="cocoa-embed report",
        pictures=_has_pictures(samples.values()),
        bidirectional=is_bidirectional({"recipe": run.recipe}),
        **_samples(run, samples, alerts),
    )
    scores = _scores(run, asked, alerts)
    if scores is not None:
        report = replace(
            report,
            evaluations=[_scored(run, scores), *given.evaluations],
            headlines=[*score_headlines(scores), *given.headlines],
            galleries=scores.galleries,
        )
    return replace(report, alerts=alerts)


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
        reached = f"; its newest checkpoint is of step {step:,}, as far as its curves go" if step else ""
        alerts.append(
            f"The {STAGE_TITLES[stage]} stage is not finished{reached}. What {'else ' * bool(step)}it would show is "
            "missing here."
        )
    alerts += [
        f"The {STAGE_TITLES[stage]} stage is finished, but its folder has gone: only the last figures of its log are "
        "left."
        for stage in run.gone
    ]
    return alerts


def _facts(run: FinishedRun) -> list[tuple[str, str]]:
    facts = [("run", printable(run.folder.resolve()))]
    if run.results:
        training = read_training(run.results[-1].folder, needs_weights=False)
        facts += [("backbone", str(training["backbone"])), ("origin", str(training["origin"]))]
        before = [STAGE_TITLES.get(stage, stage) for stage in earlier_stages(run)]
        if before:
            facts.append(("trained before this run", ", ".join(before)))
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
            kept_out_images(run, stage),
            _draw_notes(run, stage),
        )
        for stage, known in run.rows.items()
        if stage in STAGE_TITLES
    ]
    shown = [(row.subset, printable(row.source), row.reason) for row in run.bad[:SHOWN_BAD_ROWS]]
    return DataUsed(stages, len(run.bad), shown) if stages else None


def _draw_notes(run: FinishedRun, stage: str) -> list[str]:
    result = next((result for result in run.results if result.stage == stage), None)
    if result is None:
        return []
    drawn, is_whole = draws(run, stage)
    size = run.recipe[stage]["batch_size"]
    some = "" if is_whole else ", too few to be sure of each row"
    return [f"{drawn:,} drawn: {result.steps:,} steps of {size:,}{some}"]


def _has_pictures(samples: Iterable[Samples | None]) -> bool:
    """Tell whether a run has images, as far as its samples show."""
    made = [each for each in samples if each is not None and each.failure is None]
    return not made or any(each.patches or any(words.image is not None for words in each.tokens) for each in made)


def _rows_note(run: FinishedRun, stage: str, *, kept_out: bool) -> str:
    if kept_out:
        return f"These rows were kept out of the stage: it was not trained on them. {before_the_bridge(run)}".rstrip()
    drew = "was trained on these rows" if draws(run, stage)[1] else "draws its training from these rows"
    return f"The stage {drew}, so they show what it has learned, and not how it does on others."


def _samples(run: FinishedRun, samples: Mapping[str, Samples | None], alerts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"patches": [], "tokens": [], "bridge_mask": None, "sample_notes": {}}
    for stage in ("warmup", "bridge"):
        of_stage, title = samples.get(stage), STAGE_TITLES[stage]
        if of_stage is None:
            if stage in samples and stage not in run.gone:
                alerts.append(f"The {title} stage left no samples behind; runs begun with this version do.")
            continue
        if of_stage.failure is not None:
            alerts.append(f"The {title} stage could not leave samples behind: {of_stage.failure}.")
            continue
        found["patches"] += of_stage.patches
        found["tokens"] += of_stage.tokens
        found["bridge_mask"] = found["bridge_mask"] or of_stage.mask
        found["sample_notes"][title] = _rows_note(run, stage, kept_out=of_stage.kept_out)
    return found


def _scores(run: FinishedRun, asked: Asked, alerts: list[str]) -> RunScores | None:
    if asked.images is not None and asked.pairs is None:
        raise UsageError("--images says where the images of --pairs are; give --pairs too, or leave it out")
    if not asked.scores and asked.pairs is not None:
        raise UsageError("--no-scores and --pairs do not go together; leave one of them out")
    if asked.pairs is not None and not run.results:
        raise UsageError(f"{printable(run.folder)} has no finished stage, so there is no model to score on --pairs")
    if not asked.scores or not run.results:
        return None
    if asked.pairs is None and run.missing:
        alerts.append("A run that is not finished is not scored without being asked; --pairs scores what there is.")
        return None
    device = find_device(asked.device)
    how: dict[str, Any] = {"batch_tokens": asked.batch_tokens, "progress": asked.progress}
    if asked.pairs is not None:
        return score_run(run, given_pairs(run, asked.pairs, asked.images), device, **how)
    try:
        return score_run(run, own_pairs(run, asked.tell), device, **how)
    except CocoaError as error:
        alerts.append(
            f"The model could not be scored on rows of its own ({one_line(error).rstrip('.')}); there are no galleries."
            " Give other rows with --pairs."
        )
        return None


def _scored(run: FinishedRun, scores: RunScores) -> Evaluation:
    note = " ".join(filter(None, [stage_note(run, scores.stage), scores.scored.note]))
    return Evaluation(scores.scored.title, note, [directions_table(scores.document)])
