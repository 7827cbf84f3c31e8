"""Draw training curves as SVG.

Lines are drawn in placeholder colours that become CSS variables, so that one drawing works in light and dark pages.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cocoa_embed.errors import require
from cocoa_embed.report.words import GEOMETRY, MATCHING, NO_IMAGE, SERIES, SHUFFLED, duration

Points = list[tuple[int, float]]

LARGE, SMALL = (4.6, 2.9), (3.4, 2.1)
"""Width and height of charts, in inches of 72 units."""

_COLOURS = ("ink", "grid", "total", "text", "image", "right", "shuffled", "other")
_PLACEHOLDERS = {colour: f"#0102{index:02x}" for index, colour in enumerate(_COLOURS)}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_AXES = {"accuracy": "correct (%)", "loss": "loss"}
_SMOOTHED_FROM = 60


class Curve(NamedTuple):
    """The log of a stage: ``series`` maps a metric to its (step, value) points; ``seconds`` is the stage's duration."""

    stage: str
    series: dict[str, Points]
    seconds: float


class Line(NamedTuple):
    """One line of a chart: its label, its colour (a CSS variable's name) and its (step, value) points."""

    label: str
    colour: str
    points: Points


class Panel(NamedTuple):
    """One chart: ``svg`` is trusted markup, every other text has to be escaped."""

    title: str
    detail: str
    quantity: str
    lines: list[Line]
    svg: str


class Measure(NamedTuple):
    """One metric of the embeddings' geometry: its meaning, its last value in each stage, and its charts."""

    title: str
    meaning: str
    lasts: list[tuple[str, str]]
    panels: list[Panel]


def read_curves(stages: Mapping[str, Any]) -> list[Curve]:
    """Return the losses, accuracies and measures that stages have logged, finite values only.

    :param stages: The ``stages`` of ``run.json``.
    """
    curves = []
    for name, stage in stages.items():
        logged = dict.fromkeys(key for line in stage["log"] for key in line)
        drawn = [key for key in logged if key.endswith(("loss", "accuracy")) and key != "train_loss"]
        drawn += [key for key in logged if key in SERIES or key in GEOMETRY]
        series = {key: _points(stage, key) for key in logged if key in drawn}
        curves += [Curve(name, series, stage["seconds"])] if logged else []
    return curves


def _points(stage: Mapping[str, Any], key: str) -> Points:
    points = [(int(line["step"]), line[key]) for line in stage["log"] if key in line]
    return [(step, value) for step, value in points if math.isfinite(value)]


def stage_panels(curves: Sequence[Curve]) -> list[Panel]:
    """Return one panel for the losses of each stage, and one for each other quantity that a stage logs."""
    panels: list[Panel] = []
    for curve in curves:
        for quantity, lines in _by_quantity(curve.series).items():
            svg = _chart(f"stage-{len(panels)}", quantity, lines)
            panels.append(Panel(curve.stage, _pace(curve), quantity, lines, svg))
    return panels


def plateau_panel(curves: Sequence[Curve]) -> Panel | None:
    """Return the panel of the accuracy with the matching image and with a shuffled one; None without both."""
    for curve in curves:
        found = {name: curve.series.get(name) for name in (MATCHING, SHUFFLED, NO_IMAGE)}
        if found[MATCHING] and found[SHUFFLED]:
            lines = [Line(*SERIES[name], points) for name, points in found.items() if points]
            return Panel(curve.stage, _pace(curve), "accuracy", lines, _chart("plateau", "accuracy", lines))
    return None


def measures(curves: Sequence[Curve]) -> list[Measure]:
    """Return the geometry of the embeddings in each stage; a stage that measured it more than once has a chart."""
    found = []
    for name, meaning in GEOMETRY.items():
        title = name.replace("_", " ")
        measured = [(curve.stage, points) for curve in curves if (points := curve.series.get(name))]
        panels = [
            Panel(stage, "", title, lines, _chart(f"{name}-{number}", title, lines))
            for number, (stage, points) in enumerate(measured)
            for lines in [[Line(stage, ("text", "image")[number % 2], points)]]
            if len(points) > 1
        ]
        lasts = [(stage, f"{points[-1][1]:.3g}".replace("-", "−")) for stage, points in measured]
        found += [Measure(title.capitalize(), meaning, lasts, panels)] if measured else []
    return found


def _pace(curve: Curve) -> str:
    last = max((step for points in curve.series.values() for step, _ in points), default=0)
    return f"{last:,} steps in {duration(curve.seconds)}"


def _by_quantity(series: Mapping[str, Points]) -> dict[str, list[Line]]:
    """Group the lines of a stage by "loss" and "accuracy"."""
    groups: dict[str, list[Line]] = {}
    for name, points in series.items():
        if name in (MATCHING, SHUFFLED, NO_IMAGE, *GEOMETRY) or not points:
            continue
        label, colour = SERIES.get(name, (name.replace("_", " "), "other"))
        groups.setdefault("loss" if name.endswith("loss") else "accuracy", []).append(Line(label, colour, points))
    return groups


def _chart(key: str, quantity: str, lines: list[Line]) -> str:
    """Draw ``lines`` over the steps and return an SVG element whose ids begin with ``key``."""
    matplotlib = require("matplotlib", "report")
    figure = require("matplotlib.figure", "report").Figure(
        figsize=LARGE if quantity in _AXES else SMALL, layout="constrained"
    )
    axes = figure.add_subplot()
    for line in lines:
        _draw_line(axes, line)
    _style(axes, quantity, lines)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_the_page(buffer.getvalue(), key)


def _style(axes: Any, quantity: str, lines: list[Line]) -> None:  # noqa: ANN401  matplotlib is optional
    ticker = require("matplotlib.ticker", "report")
    ink, grid = _PLACEHOLDERS["ink"], _PLACEHOLDERS["grid"]
    steps, values = ({point[axis] for line in lines for point in line.points} for axis in (0, 1))
    if quantity in _AXES:  # other charts have the name in their heading
        axes.set_ylabel(_AXES[quantity], color=ink, fontsize=11)
        if min(values) >= 0:
            axes.set_ylim(bottom=0, top=None if max(values) else 1)
    axes.set_xlabel("training step", color=ink, fontsize=11)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    if len(steps) == 1:
        axes.set_xticks(list(steps))
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=""))
    axes.tick_params(colors=ink, labelsize=10.5, length=0)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)


def _draw_line(axes: Any, line: Line) -> None:  # noqa: ANN401  matplotlib is optional
    colour, raw = _PLACEHOLDERS[line.colour], line.points
    if len(raw) >= _SMOOTHED_FROM:
        axes.plot(*np.transpose(raw), color=colour, linewidth=0.8, alpha=0.3)
    marker = "o" if len(raw) == 1 else ""
    axes.plot(*np.transpose(smoothed(raw)), color=colour, linewidth=2.0, marker=marker, solid_capstyle="round")


def smoothed(points: Points) -> Points:
    """Return ``points`` or, if there are many, their running mean (over a window of one 25th of them)."""
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
    for colour, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{colour})")
    return svg
