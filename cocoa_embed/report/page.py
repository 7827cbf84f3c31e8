"""A report as one HTML file that needs no network."""

import math
from itertools import groupby
from pathlib import Path
from typing import Any

from cocoa_embed.errors import require
from cocoa_embed.report import figures
from cocoa_embed.report.content import OURS, RetrievalRow, RunReport

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(report: RunReport, path: str | Path) -> None:
    """Write the page to ``path``."""
    Path(path).write_text(render_report(report), encoding="utf-8")


def render_report(report: RunReport) -> str:
    """Return the page: one HTML document with its styles, images and charts inside.

    :raises MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data_uri": figures.data_uri, "token": token_text}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(**_content(report))
    return page


def token_text(token: str) -> str:
    """Return ``token`` as people read it: without its leading space, white space alone made visible."""
    text = token.replace("Ġ", " ").replace("Ċ", "\n")
    return text.strip() or {"": "∅"}.get(text, "⏎" if "\n" in text else "␣")


def _content(report: RunReport) -> dict[str, Any]:
    """Return the template's variables."""
    mask = report.bridge_mask
    panels, plateau = figures.stage_panels(report.curves), figures.plateau_panel(report.curves)
    content = {
        "results": _results(report.table),
        "searches": _grouped(report.queries, "title"),
        "curves": panels,
        "patches": report.patches,
        "words": _grouped(report.tokens, "stage"),
        "bridge": mask and {"mask": mask, "runs": figures.mask_runs(mask), "spans": figures.block_spans(mask.blocks),
                            "table": figures.block_table(mask)},
        "plateau": plateau,
        "notes": report.notes,
        "run": report.facts,
    }  # fmt: skip
    return content | {"report": report, "headlines": _headlines(report.table), "ours": OURS}


def _grouped(items: list[Any], attribute: str) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return groups


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _results(table: list[RetrievalRow]) -> list[dict[str, Any]]:
    """Return the table by direction: rows of cells (text, value, whether it is the best of its column)."""
    groups = []
    ordered = sorted(table, key=lambda row: [other.direction for other in table].index(row.direction))
    for direction, members in groupby(ordered, key=lambda row: row.direction):
        rows = list(members)
        columns = []
        for measure in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr"):
            values = [getattr(row, measure) for row in rows]
            texts = [
                f"{value:.3f}" if measure == "mrr" and math.isfinite(value) else _percent(value) for value in values
            ]
            best = max((value for value in values if math.isfinite(value)), default=None)
            best_text = texts[values.index(best)] if best is not None else None
            columns.append([(text, value, text == best_text) for text, value in zip(texts, values, strict=True)])
        lines = [(row.name, cells) for row, cells in zip(rows, zip(*columns, strict=True), strict=True)]
        groups.append({"direction": direction, "rows": lines})
    return groups


def _headlines(table: list[RetrievalRow]) -> list[dict[str, Any]]:
    """Return our recall@1 of each direction, with that of the others beside it."""
    return [
        {
            "direction": ours.direction,
            "value": _percent(ours.recall_at_1),
            "others": [
                (row.name, _percent(row.recall_at_1))
                for row in table
                if row.direction == ours.direction and row.name != OURS
            ],
        }
        for ours in table
        if ours.name == OURS
    ]
