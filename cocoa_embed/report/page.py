"""Render the page of a run as one HTML file that needs no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_embed.errors import require
from cocoa_embed.report import charts
from cocoa_embed.report.content import RunPage
from cocoa_embed.report.masks import Mask, spans
from cocoa_embed.report.tables import Table
from cocoa_embed.report.words import cut, token_text

SHOWN_TOKENS = 300
"""Longer sequences are cut to so many tokens."""

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_page(page: RunPage) -> str:
    """Return the page: one HTML document with its styles, images and charts inside.

    :raises MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    environment = require("jinja2", "report").Environment(
        autoescape=True, undefined=require("jinja2", "report").StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"token": token_text, "breakable": _breakable, "cut": cut, "correct_count": correct_count}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    searches: dict[str, list[Any]] = {}
    for search in page.searches:
        searches.setdefault(search.title, []).append(search)
    mask = next((Mask.parse(sample.mask).condensed() for sample in page.samples if sample.mask), None)
    html: str = template.render(
        page=page,
        searches=searches,
        curves=charts.stage_panels(page.curves),
        plateau=charts.plateau_panel(page.curves),
        measures=charts.measures(page.curves),
        patches=[sample for sample in page.samples if sample.patches],
        mask=mask,
        mask_table=mask and _mask_table(mask),
        spans=mask and spans(mask.blocks),
        has_images=any(token["image"] for sample in page.samples for token in sample.tokens),
        shown_tokens=SHOWN_TOKENS,
    )
    return html.encode("utf-8", errors="backslashreplace").decode("utf-8")  # names of files need not be Unicode


def correct_count(sample: Mapping[str, Any]) -> int:
    """Return how many masked tokens of a sample were predicted correctly."""
    parts = zip(sample["masked"], sample["tokens"], sample["predicted"], strict=True)
    return sum(masked and token == predicted for masked, token, predicted in parts)


def _mask_table(mask: Mask) -> Table:
    views = mask.table()
    rows = [(f"{reader} attends to", *seen.values()) for reader, seen in views.items()]
    return Table("", ("", *views), rows)


def _breakable(text: str) -> Any:  # noqa: ANN401  markup of a library that is optional
    """Return ``text`` escaped, with its underscores and slashes as places where a line may break."""
    markupsafe = require("markupsafe", "report")
    escaped = markupsafe.escape(text)
    for mark in "_/":
        escaped = escaped.replace(mark, markupsafe.Markup(f"{mark}<wbr>"))
    return escaped
