"""The results on pairs of one's own as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_embed.evaluation.metrics import METRICS
from cocoa_embed.report.tables import Table

SHOWN_METRICS = ("hit@1", "recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")


def pairs_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return a table for each direction, and one for each comparison of two models.

    :param document: From ``evaluate_pairs``.
    """
    scores = [_scores(document, direction) for direction in document["subsets"]]
    return scores + [_comparison(document, direction) for direction in document.get("comparison", ())]


def _scores(document: Mapping[str, Any], direction: str) -> Table:
    models = [document, document["other"]] if "other" in document else [document]
    rows = [
        (
            model["model"],
            *(
                _with_interval(model["subsets"][direction][name], *model["intervals"][direction][name])
                for name in METRICS
            ),
        )
        for model in models
    ]
    counts = document["counts"][direction]
    notes = [
        f"{counts['queries']} queries in {counts['groups']} groups, {counts['documents']} documents;"
        f" {document['level']:.0%} bootstrap intervals over groups ({document['resamples']} draws, seed"
        f" {document['seed']}).",
        "recall@k: the share of a query's relevant documents among the first k. hit@k: whether any of them is, which"
        " COCO and Flickr30k call R@k.",
    ]
    return Table(title_of(direction), ("model", *METRICS), rows, own=(0,), notes=notes)


def directions_table(document: Mapping[str, Any], metrics: Sequence[str] = SHOWN_METRICS) -> Table:
    """Return one model's scores as one narrow table: a row for each metric, a column for each direction.

    :param document: From ``evaluate_pairs``, of one model.
    """
    ways = list(document["subsets"])
    rows = [
        (name, *(_with_interval(document["subsets"][way][name], *document["intervals"][way][name]) for way in ways))
        for name in metrics
    ]
    counts = document["counts"]
    searched = "; ".join(
        f"{title_of(way)}: {counts[way]['queries']} queries, {counts[way]['documents']} documents" for way in ways
    )
    notes = [
        f"{searched}. In brackets {document['level']:.0%} bootstrap intervals.",
        "hit@1: a right answer is in first place. recall@k: the share of a query's right answers among the first k."
        " mrr: the mean of 1 / the place of the first right answer.",
    ]
    return Table(document["model"], ("metric", *(title_of(way) for way in ways)), rows, notes=notes)


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f}–{high:.3f})"


def _comparison(document: Mapping[str, Any], direction: str) -> Table:
    rows = [
        (
            name,
            f"{found['difference']:+.3f}",
            f"{found['low']:+.3f} to {found['high']:+.3f}",
            f"{found['p']:.4f}",
        )
        for name, found in document["comparison"][direction].items()
    ]
    notes = [
        f"{document['model']} less {document['other']['model']}, on the same queries. p: two-sided, by random signs of"
        " the groups' differences. The metrics are of the same queries: several small p are not several findings."
    ]
    header = ("metric", "difference", f"{document['level']:.0%} interval", "p")
    return Table(f"{title_of(direction)}: the models compared", header, rows, notes=notes)


def title_of(direction: str) -> str:
    """Return a direction as people read it."""
    return direction.replace("_", " ").capitalize()
