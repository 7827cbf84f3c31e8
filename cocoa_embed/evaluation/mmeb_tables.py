"""The results on MMEB-V1 as tables, next to the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cocoa_embed.data.mmeb import AVERAGES, PUBLISHED, ROWS_OF_A_SUBSET, SUBSETS
from cocoa_embed.report.tables import Score, Table

COLUMNS = ("precision@1", "hit@5", "hit@10", "mrr", "ndcg@10", "chance")
ABSENT = Score("–")


def mmeb_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the averages next to the published ones, and the scores of every subset, in percent.

    :param document: From ``summary``.
    """
    return [_averages(document), _subsets(document)]


def _averages(document: Mapping[str, Any]) -> Table:
    is_public = not any(map(_has_other_rows, document["subsets"].values()))
    own = [_average(document["averages"][name], document["coverage"][name], is_public) for name in AVERAGES]
    chance = [ABSENT if value is None else Score(_percent(value)) for value in document["chance"].values()]
    published = [
        (model, *(ABSENT if score is None else Score(f"{score:.1f}", score) for score in scores))
        for model, scores in PUBLISHED.items()
    ]
    notes = [
        "Precision@1 in percent, plain means over subsets. The published values are those that CoCoA (arXiv"
        " 2603.01471) reports. Bold: the best of a column. Chance: a random order of each row's candidates."
    ]
    if any(score.text.endswith("*") for score in own):
        notes.append(
            "* is not comparable with the published numbers: not all subsets were run (their number is next to the"
            f" mean), some were run on only a part of their rows, or they do not have the {ROWS_OF_A_SUBSET} rows of"
            " the public data. See the remarks."
        )
    rows = [(document["model"], *own), *published, ("chance", *chance)]
    return Table("Averages", ("model", *AVERAGES), rows, notes)


def _average(value: float | None, coverage: Mapping[str, Any], is_public: bool) -> Score:
    if value is None:
        return Score("not run")
    if coverage["complete"] and is_public:
        return Score(_percent(value), 100 * value)
    return Score(f"{_percent(value)}*", detail=f"{coverage['run']}/{coverage['of']}")


def _subsets(document: Mapping[str, Any]) -> Table:
    rows: list[list[str | Score]] = []
    for name, subset in SUBSETS.items():
        result = document["subsets"].get(name)
        if result is None:
            cells: list[str | Score] = [*[ABSENT] * (len(COLUMNS) + 1), f"not run: {document['not_run'][name]}"]
        else:
            scores = (Score(_percent(result[column])) for column in COLUMNS)
            cells = [*scores, Score(str(result["rows"])), _remarks(result)]
        rows.append([name, subset.meta_task, "IND" if subset.in_domain else "OOD", *cells])
    return Table(
        "Subsets",
        ("subset", "meta-task", "domain", *COLUMNS, "rows", "remarks"),
        rows,
        [
            "In percent, among each row's candidates. A wrong candidate with the same cosine as the correct one ranks"
            " before it, unlike in VLM2Vec's script; the remarks count these ties. Chance: the expected precision@1 of"
            " a random order."
        ],
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _has_other_rows(result: Mapping[str, Any]) -> bool:
    return not result["partial"] and result["rows"] != ROWS_OF_A_SUBSET


def _remarks(result: Mapping[str, Any]) -> str:
    remarks = {
        f"partial: {result['rows']} of {result['rows_in_data']} rows": result["partial"],
        f"the public data have {ROWS_OF_A_SUBSET} rows": _has_other_rows(result),
        f"{result['rows_merged']} rows list a target twice": result["rows_merged"],
        f"{result['tied_rows']} ties": result["tied_rows"],
    }
    return "; ".join(remark for remark, applies in remarks.items() if applies)
