"""The report's pictures: images as data URIs, and training curves as SVG.

Curves are drawn in stand-in colours that become CSS variables, so that one drawing serves light and dark pages.
"""

import base64
import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cocoa_embed.errors import require
from cocoa_embed.report.series import GEOMETRY, NO_IMAGE, PLATEAU, SERIES, STAGE_TITLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from cocoa_embed.report.content import Curve

Points = list[tuple[int, float]]

LARGEST_SIDE = 384
"""Longest side in pixels of an image in the page; larger ones are scaled down."""

EXACT_PIXELS = 128 * 128
"""Images of no more pixels are shown as they are."""

JPEG_QUALITY = 88

_COLOURS = ("ink", "grid", "total", "text", "image", "right", "shuffled", "other")
_STAND_INS = {colour: f"#0102{index:02x}" for index, colour in enumerate(_COLOURS)}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_AXES = {"accuracy": "hidden words right (%)", "loss": "loss"}
_SMOOTHED_FROM = 60

LARGE, SMALL = (4.6, 2.9), (3.4, 2.1)
"""Width and height of charts, in inches of 72 units."""


class Line(NamedTuple):
    """One line of a chart: its label, its colour (a CSS variable's name) and its (step, value) points."""

    label: str
    colour: str
    points: Points


@dataclass(frozen=True)
class Measure:
    """One measure of the embeddings: what it means, its last value in each stage, and its charts."""

    title: str
    meaning: str
    lasts: list[tuple[str, str]]
    panels: "list[Panel]"


@dataclass(frozen=True)
class Panel:
    """One chart: ``svg`` is trusted markup, every other text is to be escaped."""

    title: str
    detail: str
    quantity: str
    lines: list[Line]
    svg: str


def data_uri(image: "Image.Image", largest_side: int = LARGEST_SIDE) -> str:
    """Return ``image`` as a data URI, scaled down to ``largest_side`` pixels if it is larger.

    It is a PNG, or where that is the smaller of the two, as of photographs, and pixels are many, a JPEG.
    """
    image = image.convert("RGB")
    image.thumbnail((largest_side, largest_side))
    found = {"png": _encoded(image, "PNG", optimize=True)}
    if image.width * image.height > EXACT_PIXELS:
        found["jpeg"] = _encoded(image, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind = min(found, key=lambda each: len(found[each]))
    return f"data:image/{kind};base64," + base64.b64encode(found[kind]).decode("ascii")


def _encoded(image: "Image.Image", kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def duration(seconds: float) -> str:
    """Return ``seconds`` for people: "8 s", "4 min 12 s", "1 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def stage_panels(curves: "Sequence[Curve]") -> list[Panel]:
    """Return one panel for the losses of each stage, and one for each other quantity that a stage logs.

    "contrastive only" shares the panel of "contrastive" where both are there. The two accuracies of
    ``PLATEAU`` are left to ``plateau_panel``.
    """
    stages = {curve.stage: curve for curve in curves}
    panels: list[Panel] = []
    for curve in curves:
        if curve.stage == "contrastive only" and "contrastive" in stages:
            continue
        rival = stages.get("contrastive only") if curve.stage == "contrastive" else None
        for quantity, lines in _by_quantity(curve.series).items():
            key = f"stage-{len(panels)}"
            if rival and quantity == "loss":
                panels.append(_comparison(key, curve, rival, list(stages)))
            else:
                panels.append(Panel(curve.stage, _pace(curve), quantity, lines, _chart(key, quantity, lines)))
    return panels


def _comparison(key: str, curve: "Curve", rival: "Curve", stages: "Sequence[str]") -> Panel:
    before = [stage for stage in list(STAGE_TITLES.values())[:2] if stage in stages]
    lines = [
        Line(label, colour, line.points)
        for label, colour, stage in (
            (f"after {' and '.join(before)}" if before else curve.stage, "right", curve),
            ("contrastive only", "shuffled", rival),
        )
        for line in _by_quantity(stage.series).get("loss", [])[:1]
    ]
    detail = f"{_pace(curve)}; contrastive only: {_pace(rival)}"
    return Panel(curve.stage, detail, "loss", lines, _chart(key, "loss", lines))


def plateau_panel(curves: "Sequence[Curve]") -> Panel | None:
    """Return the panel of the bridge's accuracy with the right image and with another, or None without both."""
    for curve in curves:
        points = [_finite(curve.series.get(name, [])) for name in PLATEAU]
        if curve.stage == "bridge" and all(points):
            lines = [Line(*SERIES[name], values) for name, values in zip(PLATEAU, points, strict=True)]
            if without := _finite(curve.series.get(NO_IMAGE, [])):
                lines.append(Line(*SERIES[NO_IMAGE], without))
            return Panel(curve.stage, _pace(curve), "accuracy", lines, _chart("plateau", "accuracy", lines, band=True))
    return None


def measures(curves: "Sequence[Curve]") -> list[Measure]:
    """Return what the stages logged of their embeddings' shape; a chart for each stage that measured more than once."""
    found = []
    for name, (title, _, meaning) in GEOMETRY.items():
        measured = [(curve, _finite(curve.series.get(name, []))) for curve in curves]
        measured = [(curve, points) for curve, points in measured if points]
        if not measured:
            continue
        panels = [
            Panel(curve.stage, "", title.lower(), lines, _chart(f"{name}-{number}", title.lower(), lines, small=True))
            for number, (curve, points) in enumerate(measured)
            for lines in [[Line(curve.stage, "text" if curve.stage == "bridge" else "image", points)]]
            if len(points) > 1
        ]
        lasts = [(curve.stage, _shown(points[-1][1])) for curve, points in measured]
        found.append(Measure(title, meaning, lasts, panels))
    return found


def _shown(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _pace(curve: "Curve") -> str:
    last = max((step for points in curve.series.values() for step, _ in points), default=0)
    return f"{last:,} steps in {duration(curve.seconds)}"


def _finite(points: Points) -> Points:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _by_quantity(series: "Mapping[str, Points]") -> dict[str, list[Line]]:
    """Group ``series`` into "loss", "accuracy" and whatever else there is; empty ones are dropped."""
    groups: dict[str, list[Line]] = {}
    for name, points in series.items():
        repeats = name == "loss" and any(_same(points, series[other]) for other in series if other.endswith("_loss"))
        if name in (*PLATEAU, NO_IMAGE, *GEOMETRY) or repeats or not _finite(points):
            continue
        quantity = next((known for known in ("loss", "accuracy") if known in name), name.replace("_", " "))
        label, colour = SERIES.get(name, (name.replace("_", " "), "other"))
        groups.setdefault(quantity, []).append(Line(label, colour, _finite(points)))
    return groups


def _same(left: Points, right: Points) -> bool:
    return len(left) == len(right) and bool(np.allclose(left, right, rtol=1e-3, equal_nan=True))


def _chart(key: str, quantity: str, lines: list[Line], *, band: bool = False, small: bool = False) -> str:
    """Draw ``lines`` over the steps and return an SVG element whose ids begin with ``key``.

    With ``band``, the area between the first two lines is tinted. A ``small`` chart leaves its axis to the heading.
    """
    matplotlib = require("matplotlib", "report")
    figure = require("matplotlib.figure", "report").Figure(figsize=SMALL if small else LARGE, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        _draw_line(axes, line)
    if band:
        steps = sorted({step for line in lines[:2] for step, _ in line.points})
        edges = [np.interp(steps, *np.transpose(smoothed(line.points))) for line in lines[:2]]
        axes.fill_between(steps, *edges, color=_STAND_INS[lines[0].colour], alpha=0.14, linewidth=0)
    if quantity in _AXES and min(value for line in lines for _, value in line.points) >= 0:
        axes.set_ylim(bottom=0)
    _style(axes, quantity)
    if small:
        axes.set_ylabel("")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_the_page(buffer.getvalue(), key)


def _style(axes: Any, quantity: str) -> None:  # noqa: ANN401  matplotlib is optional, so its types are too
    ticker = require("matplotlib.ticker", "report")
    ink, grid = _STAND_INS["ink"], _STAND_INS["grid"]
    axes.set_xlabel("training step", color=ink, fontsize=11)
    axes.set_ylabel(_AXES.get(quantity, quantity), color=ink, fontsize=11, parse_math=False)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=""))
    axes.tick_params(colors=ink, labelsize=10.5, length=0)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)


def _draw_line(axes: Any, line: Line) -> None:  # noqa: ANN401  matplotlib is optional, so its types are too
    colour, raw = _STAND_INS[line.colour], line.points
    if len(raw) >= _SMOOTHED_FROM:
        axes.plot(*np.transpose(raw), color=colour, linewidth=0.8, alpha=0.3)
    marker = "o" if len(raw) < 2 else ""
    axes.plot(*np.transpose(smoothed(raw)), color=colour, linewidth=2.0, marker=marker, solid_capstyle="round")


def smoothed(points: Points) -> Points:
    """Return ``points``, replaced by their running mean where there are many (a window of one 25th of them)."""
    if len(points) < _SMOOTHED_FROM:
        return points
    window = np.ones(len(points) // 25 // 2 * 2 + 1)
    values = np.convolve([value for _, value in points], window, mode="same")
    counts = np.convolve(np.ones(len(points)), window, mode="same")
    return [(step, float(value)) for (step, _), value in zip(points, values / counts, strict=True)]


def _for_the_page(document: str, key: str) -> str:
    """Turn a stand-alone SVG document into an element of an HTML page that holds several."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg aria-hidden="true"', re.sub(r"<svg\s+", "<svg ", svg))
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", svg)
    for colour, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    return svg
