"""Choose what the page of a run shows, from ``run.json`` and results of ``cocoa-embed eval``; nothing is read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cocoa_embed.report.content import (
    Curve,
    Evaluation,
    Headline,
    RecipeTables,
    RunPage,
    Search,
    StageData,
    StageSamples,
)
from cocoa_embed.report.tables import Table
from cocoa_embed.report.words import GEOMETRY, SERIES, duration, listed

ABSENT = "–"
FIRST = "hit@1"


@dataclass(frozen=True)
class EvalResult:
    """A result of ``cocoa-embed eval``.

    :param document: What it wrote as JSON.
    :param tables: The same as tables.
    :param file: Where it lies, for the page.
    :param is_own: The scored model is a checkpoint of this run, or an export of one.
    :param data: The absolute path of the data that it was scored on, if the document says so.
    """

    document: Mapping[str, Any]
    tables: Sequence[Table]
    file: str
    is_own: bool
    data: str | None = None


def run_page(
    run: Mapping[str, Any],
    folder: str,
    results: Sequence[EvalResult] = (),
    *,
    compared: Mapping[str, Mapping[str, Any]] | None = None,
    searches: Sequence[Search] = (),
    notes: Sequence[str] = (),
    command: str = "cocoa-embed report",
) -> RunPage:
    """Return the page of a run.

    :param run: What ``run.json`` holds.
    :param folder: The run's folder, for the page.
    :param compared: ``run.json`` of runs whose losses are drawn beside this run's, by the names to show.
    :param searches: Searches to show.
    :param notes: Sentences to end with.
    """
    recipe, stages = run["recipe"], run["stages"]
    begun = {name: stage for name, stage in stages.items() if stage["log"]}
    finished = [name for name, stage in stages.items() if stage["finished"]]
    seconds = duration(sum(stage["seconds"] for stage in stages.values()))
    name = folder.rstrip("/").rpartition("/")[2] or folder
    return RunPage(
        title=name if recipe["name"] == name else f"{name} ({recipe['name']})",
        subtitle=f"Trained from {run['backbone']}: {listed(finished)}, in {seconds}."
        if finished
        else f"A run from {run['backbone']} that has finished no stage yet.",
        command=command,
        alerts=list(_alerts(stages, folder)),
        headlines=[headline for result in results for headline in _headlines(result, run)],
        evaluations=[_evaluation(result, run) for result in results],
        searches=searches,
        curves=[_curve(name, stage, compared or {}) for name, stage in begun.items()],
        samples=[_samples(name, stage) for name, stage in stages.items() if _has_samples(stage)],
        recipe=_recipe(run),
        data=[_data(name, stage) for name, stage in stages.items()],
        notes=notes,
        facts=list(_facts(run, folder)),
    )


def _alerts(stages: Mapping[str, Any], folder: str) -> Iterable[str]:
    for name, stage in stages.items():
        if not stage["finished"]:
            yield (
                f"Stage {name} is not finished: it is at step {stage['step']:,} of {stage['steps']:,}. If it has "
                f"stopped, cocoa-embed train RECIPE --out {folder} --resume goes on."
            )
        if failure := (stage.get("samples") or {}).get("failure"):
            yield f"Stage {name} could not make its samples: {failure}."


def _trained_on(result: EvalResult, run: Mapping[str, Any]) -> list[str]:
    """Return the stages of the run that were trained on the data of a result."""
    return [name for name, stage in run["stages"].items() if result.data is not None and result.data in stage["places"]]


def _headlines(result: EvalResult, run: Mapping[str, Any]) -> Iterable[Headline]:
    """Yield the first numbers of the page: of the run's own model, on data that it was not trained on."""
    document = result.document
    if not result.is_own or _trained_on(result, run):
        return
    if document["benchmark"] == "pairs":
        others = [document["other"]] if "other" in document else []
        for way, counts in document["counts"].items():
            low, high = document["intervals"][way][FIRST]
            beside = [f"{low:.1%} to {high:.1%}"]
            beside += [f"{other['model']}: {other['subsets'][way][FIRST]:.1%}" for other in others]
            yield Headline(
                way.replace("_", " "),
                f"{document['subsets'][way][FIRST]:.1%}",
                "of queries have a right answer in first place",
                " · ".join([*beside, f"chance: {document['chance'][way][FIRST]:.1%} of {counts['documents']:,}"]),
            )
    elif (mean := document["averages"]["overall"]) is not None:
        covered, chance = document["coverage"]["overall"], document["chance"]["overall"]
        beside = [] if chance is None else [f"chance: {chance:.1%}"]
        if not covered["complete"]:
            beside.append(f"{covered['run']} of {covered['of']} subsets")
        yield Headline(document["benchmark"], f"{mean:.1%}", "precision@1, the mean over subsets", " · ".join(beside))


def _evaluation(result: EvalResult, run: Mapping[str, Any]) -> Evaluation:
    model, benchmark, trained_on = result.document["model"], result.document["benchmark"], _trained_on(result, run)
    notes = [f"From {result.file}."]
    if result.data is not None:
        notes.append(f"The pairs are those of {result.data}.")
    if not result.is_own:
        notes.append("This model is not known to be of this run.")
    if trained_on:
        notes.append(
            f"These are training data of {listed(trained_on)}: the scores show what the model has learned of them, not "
            "how it does on others."
        )
    title = f"{'Pairs' if benchmark == 'pairs' else benchmark}: {model}"
    return Evaluation(title if result.is_own else f"Another model: {model}", " ".join(notes), result.tables)


def _curve(name: str, stage: Mapping[str, Any], compared: Mapping[str, Mapping[str, Any]]) -> Curve:
    drawn = [
        key
        for key in dict.fromkeys(key for line in stage["log"] for key in line)
        if key in SERIES or key in GEOMETRY or (key.endswith(("loss", "accuracy")) and key != "train_loss")
    ]
    others = {other: run["stages"].get(name) for other, run in compared.items()}
    return Curve(
        name,
        {key: _points(stage, key) for key in drawn},
        stage["seconds"],
        {other: _points(each, "loss") for other, each in others.items() if each},
    )


def _points(stage: Mapping[str, Any], key: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), line[key]) for line in stage["log"] if key in line]


def _has_samples(stage: Mapping[str, Any]) -> bool:
    return bool((stage.get("samples") or {}).get("tokens"))


def _samples(name: str, stage: Mapping[str, Any]) -> StageSamples:
    samples = stage["samples"]
    if samples["held_out"]:
        seen_by = listed(stage["held_out"]["seen_by"])
        note = "The stage was not trained on these rows" + f"; they are of the data of {seen_by}" * bool(seen_by) + "."
    else:
        note = "The stage trains on these rows: they show what it has learned, not how it does on others."
    return StageSamples(name, note, samples.get("patches", []), samples["tokens"], samples.get("mask"))


def _recipe(run: Mapping[str, Any]) -> RecipeTables:
    recipe, stages = run["recipe"], list(run["stages"])
    whole = [
        (f"{key}.{each}" if each else key, _value(value))
        for key, values in recipe.items()
        if key not in (*stages, "name", "data")
        for each, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    given: list[tuple[str, ...]] = []
    defaults: list[tuple[str, ...]] = []
    for key in dict.fromkeys(key for stage in stages for key in recipe[stage] if key != "data"):
        values = [_value(recipe[stage].get(key)) or ABSENT for stage in stages]
        is_given = any(key in run["given"].get(stage, {}) for stage in stages)
        if set(values) != {ABSENT}:
            (given if is_given else defaults).append((key, *values))
    return RecipeTables(
        [row for row in whole if row[1]],
        Table("", ("key", *stages), given),
        Table("", ("key", *stages), defaults),
        json.dumps(run["given"], indent=2, ensure_ascii=False),
    )


def _value(value: object) -> str:
    """Return a value of a recipe as text; nothing for what is not set."""
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, list):
        return ", ".join(_value(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data(name: str, stage: Mapping[str, Any]) -> StageData:
    kept_out = len(stage.get("held_out", {}).get("rows", ()))
    notes = [f"{kept_out:,} of them kept out of training, with all rows that show their images"] if kept_out else []
    return StageData(
        name,
        sum(stage["rows"].values()),
        [*notes, f"{stage['steps']:,} steps of {stage['batch_size']:,} rows"],
        [(subset, _value(stage["sources"][subset]), count) for subset, count in stage["rows"].items()],
        stage["fingerprint"],
        stage["bad_rows"]["count"],
        stage["bad_rows"]["first"],
    )


def _facts(run: Mapping[str, Any], folder: str) -> Iterable[tuple[str, str]]:
    machine, inherited = run["machine"], run["inherited"]
    yield "run", folder
    yield "backbone", f"{run['backbone']} ({run['origin']})"
    if inherited["stages"]:
        yield "trained before this run", listed([stage["stage"] for stage in inherited["stages"]])
    for name, stage in run["stages"].items():
        final = {key: value for line in stage["log"] for key, value in line.items()}
        told = [f"{stage['step']:,} steps in {duration(stage['seconds'])}"]
        told += [f"{stage['trained_parameters']:,} trained parameters"] if "trained_parameters" in stage else []
        told += [f"loss {final['loss']:.3g}"] if "loss" in final else []
        told += [f"{final['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in final else []
        told += [f"{final['mfu']:.0%} of the device's FLOP/s"] if "mfu" in final else []
        yield name, ", ".join(told)
    device = f"{machine['processes']} × {machine['device']}" if machine["processes"] > 1 else machine["device"]
    yield "machine", f"{device}, {machine['platform']}, {machine['cpu_count']} CPU cores, Python {machine['python']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in run["libraries"].items())
    yield "trained by", f"cocoa-embed {run['cocoa_embed']}"
