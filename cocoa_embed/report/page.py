"""A report as one HTML file that needs no network."""

import math
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from cocoa_embed.errors import require
from cocoa_embed.report import figures, masks
from cocoa_embed.report.content import OURS, Headline, RetrievalRow, RunReport

SHOWN_CHARACTERS = 300
"""Of a longer text, so many are shown, the last of them an ellipsis."""

SHOWN_TOKENS = 300
"""Of a longer sequence, so many tokens are shown."""

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
    environment.filters |= {"data_uri": figures.data_uri, "token": token_text, "breakable": _breakable, "cut": cut}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(**_content(report))
    return page.encode("utf-8", errors="backslashreplace").decode("utf-8")  # names of files need not be Unicode


def token_text(token: str) -> str:
    """Return ``token`` as people read it: without its leading space, white space alone made visible.

    Byte-level tokenizers spell each byte as a character of its own; a token that is spelt so is decoded, half a
    character as �.
    """
    spelt = _bytes_by_character()
    text = token
    if token and all(character in spelt for character in token):
        text = bytes(spelt[character] for character in token).decode("utf-8", errors="replace")
    return text.strip() or {"": "∅"}.get(text, "⏎" if "\n" in text else "␣")


@cache
def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    Printable bytes of Latin-1 stand for themselves, the others in their order for the characters from 256 on, as GPT-2
    introduced it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def cut(text: str) -> str:
    """Return ``text``, of a longer one than ``SHOWN_CHARACTERS`` the beginning."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1].rstrip()}…"


def _breakable(text: str) -> Any:  # noqa: ANN401  markup of a library that is optional
    """Return ``text`` escaped, with its underscores as places where a line may break."""
    markupsafe = require("markupsafe", "report")
    return markupsafe.escape(text).replace("_", markupsafe.Markup("_<wbr>"))


def _content(report: RunReport) -> dict[str, Any]:
    """Return the template's variables."""
    mask = report.bridge_mask and masks.condensed(report.bridge_mask)
    panels, plateau = figures.stage_panels(report.curves), figures.plateau_panel(report.curves)
    content = {
        "results": _results(report.table),
        "evaluations": report.evaluations,
        "searches": _grouped(report.queries, "title"),
        "galleries": report.galleries,
        "curves": panels,
        "patches": report.patches,
        "bridge": mask and {"mask": mask, "runs": masks.mask_runs(mask), "spans": masks.block_spans(mask.blocks),
                            "table": masks.block_table(mask), "is_causal": masks.is_causal(mask)},
        "plateau": plateau,
        "words": _grouped(report.tokens, "stage"),
        "diagnostics": figures.measures(report.curves),
        "recipe": report.recipe,
        "data": report.data,
        "notes": report.notes,
        "run": report.facts,
    }  # fmt: skip
    headlines = [*_headlines(report.table), *report.headlines]
    stages = {curve.stage for curve in report.curves}
    return content | {
        "report": report,
        "headlines": headlines,
        "ours": OURS,
        "stages": stages,
        "shown_tokens": SHOWN_TOKENS,
    }


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


def _headlines(table: list[RetrievalRow]) -> list[Headline]:
    """Return our recall@1 of each direction, with that of the others beside it."""
    return [
        Headline(
            ours.direction,
            _percent(ours.recall_at_1),
            "of searches have the right answer in first place",
            " · ".join(
                f"{row.name}: {_percent(row.recall_at_1)}"
                for row in table
                if row.direction == ours.direction and row.name != OURS
            ),
        )
        for ours in table
        if ours.name == OURS
    ]
