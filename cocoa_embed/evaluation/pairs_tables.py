"""The results on pairs as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_embed.evaluation.metrics import METRICS
from cocoa_embed.report.tables import Score, Table

SHOWN_METRICS = ("recall@1", "recall@5", "recall@10", "mrr")
"""The metrics that a terminal shows, which has no room for all."""


def shown_metrics(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics for a terminal: hit@k instead of recall@k if an item has several right answers."""
    one_each = all(each["queries"] == each["documents"] for each in document["counts"].values())
    return tuple(name if one_each else name.replace("recall", "hit") for name in SHOWN_METRICS)


def pairs_tables(document: Mapping[str, Any], metrics: Sequence[str] = METRICS) -> list[Table]:
    """Return a table of the scores of each direction, with a row for each model and chance, then the comparisons.

    :param document: From ``evaluate_pairs``.
    """
    scores = [_scores(document, direction, metrics) for direction in document["subsets"]]
    return scores + [_comparison(document, direction, metrics) for direction in document.get("comparison", ())]


def _scores(document: Mapping[str, Any], direction: str, metrics: Sequence[str]) -> Table:
    rows: list[list[str | Score]] = []
    for model in [document, document["other"]] if "other" in document else [document]:
        values, intervals = model["subsets"][direction], model["intervals"][direction]
        rows.append([model["model"], *(_score(values[name], *intervals[name]) for name in metrics)])
    rows.append(["chance", *(Score(f"{document['chance'][direction][name]:.3f}") for name in metrics)])
    counts = document["counts"][direction]
    notes = [
        f"{counts['queries']} queries in {counts['groups']} groups, {counts['documents']} documents;"
        f" {document['level']:.0%} bootstrap intervals over groups ({document['resamples']} resamples, seed"
        f" {document['seed']}). Bold: the best of a column. Chance: a random order of the documents.",
        "recall@k: the ratio of a query's relevant documents that are among the first k. hit@k: whether any of them is,"
        " which COCO and Flickr30k call R@k.",
    ]
    return Table(_title(direction), ("model", *metrics), rows, notes)


def _score(value: float, low: float, high: float) -> Score:
    return Score(f"{value:.3f}", value, f"{low:.3f}–{high:.3f}")


def _comparison(document: Mapping[str, Any], direction: str, metrics: Sequence[str]) -> Table:
    rows = []
    for name in metrics:
        difference, low, high, p = document["comparison"][direction][name].values()
        rows.append((name, Score(f"{difference:+.3f}", detail=f"{low:+.3f} to {high:+.3f}"), Score(f"{p:.4f}")))
    notes = [
        f"{document['model']} minus {document['other']['model']}, on the same queries, with {document['level']:.0%}"
        " intervals. p: two-sided, from random signs of the groups' differences. All metrics come from the same"
        " queries, so several small p values are no more evidence than one."
    ]
    return Table(f"{_title(direction)}: difference", ("metric", "difference", "p"), rows, notes)


def _title(direction: str) -> str:
    return direction.replace("_", " ").capitalize()
