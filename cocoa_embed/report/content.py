"""Choose what the page of a run shows, from ``run.json`` and results of ``cocoa-embed eval``; no file is read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.report.tables import Table
from cocoa_embed.report.words import duration, listed

FIRST = "hit@1"


class SearchHit(NamedTuple):
    """What a search found: an image (a data URI) with its caption; ``score`` is the cosine similarity."""

    image: str
    score: float
    caption: str
    correct: bool


class Search(NamedTuple):
    """A search (text, image as a data URI, or both) and its hits, best first.

    ``title`` is the kind of search ("text → image"); ``expected`` the caption of the right answer.
    """

    title: str
    text: str | None
    image: str | None
    hits: Sequence[SearchHit]
    expected: str | None


class EvalResult(NamedTuple):
    """A result of ``cocoa-embed eval``.

    :param document: The JSON document that it wrote.
    :param tables: The document as tables.
    :param file: The path of the document, to show on the page.
    :param is_own: Whether the scored model is a checkpoint of this run, or an export of one.
    :param data: The absolute path of the data, if the document has it.
    """

    document: Mapping[str, Any]
    tables: Sequence[Table]
    file: str
    is_own: bool
    data: str | None = None


class Headline(NamedTuple):
    """A number at the top of the page: its label, its value, its meaning, and values to compare it with."""

    label: str
    value: str
    meaning: str
    detail: str


def title(run: Mapping[str, Any], folder: str) -> str:
    """Return the name of the run's folder, followed by the recipe's name if that differs."""
    name, recipe = Path(folder).name, run["recipe"]["name"]
    return name if recipe == name else f"{name} ({recipe})"


def subtitle(run: Mapping[str, Any]) -> str:
    """Return a sentence about the backbone and the finished stages."""
    finished = [name for name, stage in run["stages"].items() if stage["finished"]]
    if not finished:
        return f"A run from {run['backbone']} that has finished no stage yet."
    seconds = duration(sum(stage["seconds"] for stage in run["stages"].values()))
    return f"Trained from {run['backbone']}: {listed(finished)}, in {seconds}."


def alerts(stages: Mapping[str, Any], folder: str) -> Iterator[str]:
    """Yield a sentence about each stage that is not finished or has no samples."""
    for name, stage in stages.items():
        if not stage["finished"]:
            yield (
                f"Stage {name} is not finished: it is at step {stage['step']:,} of {stage['steps']:,}. If it has "
                f"stopped, cocoa-embed train RECIPE --out {folder} --resume continues it."
            )
        if failure := (stage["samples"] or {}).get("failure"):
            yield f"Stage {name} could not make its samples: {failure}."


def trained_on(result: EvalResult, stages: Mapping[str, Any]) -> list[str]:
    """Return the stages that were trained on the data of a result."""
    return [name for name, stage in stages.items() if result.data in stage["places"]]


def headlines(result: EvalResult, stages: Mapping[str, Any]) -> Iterator[Headline]:
    """Yield the main scores of the run's own model on data that it was not trained on."""
    document = result.document
    if not result.is_own or trained_on(result, stages):
        return
    if document["benchmark"] == "pairs":
        others = [document["other"]] if "other" in document else []
        for way, counts in document["counts"].items():
            low, high = document["intervals"][way][FIRST]
            beside = [
                f"{low:.1%} to {high:.1%}",
                *(f"{other['model']}: {other['subsets'][way][FIRST]:.1%}" for other in others),
                f"chance: {document['chance'][way][FIRST]:.1%} of {counts['documents']:,}",
            ]
            meaning, score = "of queries have a right answer in first place", document["subsets"][way][FIRST]
            yield Headline(way.replace("_", " "), f"{score:.1%}", meaning, " · ".join(beside))
    elif (mean := document["averages"]["overall"]) is not None:
        covered = document["coverage"]["overall"]
        beside = [f"chance: {document['chance']['overall']:.1%}", f"{covered['run']} of {covered['of']} subsets"]
        yield Headline(document["benchmark"], f"{mean:.1%}", "precision@1, the mean over subsets", " · ".join(beside))


def evaluation_title(result: EvalResult) -> str:
    """Return the heading of a result."""
    benchmark, model = result.document["benchmark"].replace("pairs", "Pairs"), result.document["model"]
    return f"{benchmark}: {model}" if result.is_own else f"Another model: {model}"


def evaluation_note(result: EvalResult, stages: Mapping[str, Any]) -> str:
    """Return the origin of a result, with a warning if its data are training data, or its model is not the run's."""
    notes = [f"From {result.file}."]
    if result.data is not None:
        notes.append(f"The pairs are those of {result.data}.")
    if not result.is_own:
        notes.append("This model is not known to come from this run.")
    if seen_by := trained_on(result, stages):
        notes.append(
            f"These are training data of {listed(seen_by)}: the scores show what the model has learned from them, not "
            "how it does on other data."
        )
    return " ".join(notes)


def samples_note(stage: Mapping[str, Any]) -> str:
    """Return a sentence on whether a stage was trained on the rows of its samples."""
    if not stage["samples"]["held_out"]:
        return "The stage trains on these rows: they show what it has learned, not how it does on other rows."
    seen_by = listed(stage["held_out"]["seen_by"])
    return "The stage was not trained on these rows" + f"; they come from the data of {seen_by}" * bool(seen_by) + "."


def facts(run: Mapping[str, Any], folder: str) -> Iterator[tuple[str, str]]:
    """Yield (label, value) pairs about the run."""
    machine, inherited = run["machine"], run["inherited"]
    yield "run", folder
    yield "backbone", f"{run['backbone']} ({run['origin']})"
    if inherited["stages"]:
        yield "trained before this run", listed([stage["stage"] for stage in inherited["stages"]])
    for name, stage in run["stages"].items():
        known = {**stage, **{key: value for line in stage["log"] for key, value in line.items()}}
        words = {"trained_parameters": "{:,} trained parameters", "loss": "loss {:.3g}"}
        words |= {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "{:.0%} of the device's FLOP/s"}
        logged = [text.format(known[key]) for key, text in words.items() if key in known]
        yield name, ", ".join([f"{stage['step']:,} steps in {duration(stage['seconds'])}", *logged])
    device = f"{machine['processes']} × {machine['device']}" if machine["processes"] > 1 else machine["device"]
    yield "machine", f"{device}, {machine['platform']}, {machine['cpu_count']} CPU cores, Python {machine['python']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in run["libraries"].items())
    yield "trained by", f"cocoa-embed {run['cocoa_embed']}"
