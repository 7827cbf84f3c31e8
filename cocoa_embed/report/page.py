"""Render the page of a run as one HTML file that needs no network."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cocoa_embed.report import charts, content
from cocoa_embed.report.content import EvalResult, Search
from cocoa_embed.report.html import render
from cocoa_embed.report.masks import Mask, spans
from cocoa_embed.report.words import token_text

SHOWN_TOKENS = 300
"""Longer sequences are cut to this many tokens."""


def render_page(
    run: Mapping[str, Any],
    folder: str,
    results: Sequence[EvalResult] = (),
    *,
    title: str | None = None,
    subtitle: str | None = None,
    searches: Sequence[Search] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page of a run: one HTML document with its styles, images and charts; empty sections are left out.

    :param run: The content of ``run.json``.
    :param folder: The run's folder, to show on the page.
    :param title: The title; by default the name of the folder and, if it differs, of the recipe.
    :param subtitle: The subtitle; by default a sentence about backbone and stages.
    :param searches: Searches to show; those with the same title have to be adjacent.
    :param notes: Sentences to show at the end.
    :raises MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    # A stage that has not begun has neither samples nor held-out rows.
    stages = {name: {"samples": None, "held_out": {"rows": []}, **stage} for name, stage in run["stages"].items()}
    curves = charts.read_curves(stages)
    sampled = {name: stage for name, stage in stages.items() if (stage["samples"] or {}).get("tokens")}
    samples = [stage["samples"] for stage in sampled.values()]
    mask = next((Mask.parse(each["mask"]).condensed() for each in samples if each.get("mask")), None)
    return render(
        Path(__file__).with_name("report.html.jinja"),
        "report",
        {"token": token_text, "correct_count": correct_count, "samples_note": content.samples_note},
        title=title or content.title(run, folder),
        subtitle=subtitle or content.subtitle(run),
        alerts=list(content.alerts(stages, folder)),
        headlines=[headline for result in results for headline in content.headlines(result, stages)],
        evaluations=[
            (content.evaluation_title(result), content.evaluation_note(result, stages), result.tables)
            for result in results
        ],
        searches={kind: list(found) for kind, found in groupby(searches, key=lambda search: search.title)},
        curves=charts.stage_panels(curves),
        plateau=charts.plateau_panel(curves),
        measures=charts.measures(curves),
        sampled=sampled,
        patched={name: stage for name, stage in sampled.items() if stage["samples"].get("patches")},
        mask=mask,
        spans=mask and spans(mask.blocks),
        has_images=any(token["image"] for each in samples for token in each["tokens"]),
        shown_tokens=SHOWN_TOKENS,
        recipes=[json.dumps(run[key], indent=2, ensure_ascii=False) for key in ("given", "recipe")],
        stages=stages,
        notes=notes,
        run_facts=list(content.facts(run, folder)),
    )


def correct_count(sample: Mapping[str, Any]) -> int:
    """Return the number of masked tokens of a sample that were predicted correctly."""
    parts = zip(sample["masked"], sample["tokens"], sample["predicted"], strict=True)
    return sum(masked and token == predicted for masked, token, predicted in parts)
