"""The results on MMEB-V1 as tables, beside what was published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cocoa_embed.data.mmeb import AVERAGES, PUBLISHED, ROWS_OF_A_SUBSET, SUBSETS
from cocoa_embed.report.tables import Table

COLUMNS = ("precision@1", "hit@5", "hit@10", "mrr", "ndcg@10")
ABSENT = "–"


def mmeb_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the averages beside the published ones, and the scores of every subset, in per cent.

    :param document: From ``summary``.
    """
    return [_averages(document), _subsets(document)]


def _averages(document: Mapping[str, Any]) -> Table:
    own = [_average(document["averages"][name], document["coverage"][name]) for name in AVERAGES]
    published = [
        (scores.model, *(ABSENT if score is None else f"{score:.1f}" for score in scores.scores))
        for scores in PUBLISHED
    ]
    notes = ["Precision@1 in per cent, plain means over subsets. Published: as CoCoA (arXiv 2603.01471) reports them."]
    if not all(each["complete"] for each in document["coverage"].values()):
        notes.append(
            "* incomplete: the mean over the subsets that were run, how many of how many in brackets, some of them"
            " perhaps on a part of their rows only. Not to be compared with the published numbers."
        )
    others = sum(map(_has_other_rows, document["subsets"].values()))
    if others:
        notes.append(
            f"{others} of the subsets that were run do not have the {ROWS_OF_A_SUBSET} rows of the public data: see the"
            " remarks. Means over them are not to be compared with the published numbers."
        )
    return Table("Averages", ("model", *AVERAGES), [(document["model"], *own), *published], own=(0,), notes=notes)


def _average(value: float | None, coverage: Mapping[str, Any]) -> str:
    if value is None:
        return "not run"
    return f"{value:.1%}".rstrip("%") + ("" if coverage["complete"] else f"* ({coverage['run']}/{coverage['of']})")


def _subsets(document: Mapping[str, Any]) -> Table:
    rows = []
    for name, subset in SUBSETS.items():
        kind = (name, subset.meta_task, "IND" if subset.in_domain else "OOD")
        result = document["subsets"].get(name)
        if result is None:
            rows.append((*kind, *[ABSENT] * (len(COLUMNS) + 1), f"not run: {document['not_run'][name]}"))
        else:
            scores = (f"{100 * result[column]:.1f}" for column in COLUMNS)
            rows.append((*kind, *scores, str(result["rows"]), _remarks(result)))
    return Table(
        "Subsets",
        ("subset", "meta-task", "domain", *COLUMNS, "rows", "remarks"),
        rows,
        notes=[
            "In per cent, of the rows' own candidates. A candidate that scores as the right one does counts as before"
            " it, unlike in VLM2Vec's own script; remarks say where that happened."
        ],
    )


def _has_other_rows(result: Mapping[str, Any]) -> bool:
    return not result["partial"] and result["rows"] != ROWS_OF_A_SUBSET


def _remarks(result: Mapping[str, Any]) -> str:
    remarks = []
    if result["partial"]:
        remarks.append(f"partial: {result['rows']} of {result['rows_in_data']} rows")
    elif _has_other_rows(result):
        remarks.append(f"the public data have {ROWS_OF_A_SUBSET} rows")
    if result["rows_without_image"]:
        remarks.append(f"{result['rows_without_image']} rows without their images left out")
    if result["rows_merged"]:
        remarks.append(f"{result['rows_merged']} rows list a target twice")
    if result["tied_rows"]:
        remarks.append(f"{result['tied_rows']} ties")
    return "; ".join(remarks)
