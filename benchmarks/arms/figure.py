"""The ablation's figure, from the results' file alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from math import ceil
from statistics import fmean
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arms.grid import ALL_THREE, ALONE, CAPTIONS_AS_PAIRS, EQUAL, NO_BRIDGE
from arms.summary import TITLES, bridge_values, estimate, values

COLOURS = {ALL_THREE: "#1d8a4a", EQUAL: "#c8690f", ALONE: "#8d837b", CAPTIONS_AS_PAIRS: "#8447a8", NO_BRIDGE: "#2c66c4"}
LEARNED = {
    "loss": ("loss on hidden words", "#57493f"),
    "accuracy_matching_image": ("words right, right image", "#1d8a4a"),
    "accuracy_shuffled_image": ("words right, another image", "#8d837b"),
    "accuracy_no_image": ("words right, no image", "#c8690f"),
}
FEW, MANY = "#b3261e", "#2c66c4"
OTHER = "#57493f"
LABEL_WIDTH = 22
INK = "#2b211b"
GRID = "#e6ddd4"
SMALL = 8.5

Document = Mapping[str, Any]


def figure_svg(document: Document) -> str:
    """Draw the groups of arms that there are as SVG; the same results give the same text."""
    svg = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ablation"}):
        draw(document).savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def draw(document: Document) -> Figure:
    """Draw the groups of arms that there are, two panels a row."""
    panels = _panels(document)
    rows = ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.5 * rows + 0.5), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 2, place)
        panel(axes)
        _style(axes)
    drawn = [name for name in COLOURS if any(arm["name"] == name for arm in document["arms"])]
    lines = [Line2D([], [], color=COLOURS[name], linewidth=3, label=name) for name in drawn]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    title = f"What each stage is worth: {len(document['seeds'])} seeds, means with 95 % intervals, each seed a dot"
    figure.suptitle(title, fontsize=14, color=INK)
    return figure


def _panels(document: Document) -> list[Callable[[Axes], None]]:
    groups = {group: _arms(document, group) for group in TITLES}
    many = document["sizes"]["pairs"]
    panels: list[Callable[[Axes], None]] = []
    if groups["stages"]:
        panels.append(partial(_bars, arms=groups["stages"], title=f"The stages, {many} pairs"))
    if arms := groups["variants"]:
        title = f"Variants, {many} pairs, {_bridge_steps(arms[0])} bridge steps"
        panels.append(partial(_bars, arms=arms, title=title))
    if groups["pairs"]:
        panels.append(partial(_pairs, document=document))
    if arms := groups["length"]:
        few = min(arm["pairs"] for arm in arms)
        panels += [
            partial(_learned, arms=_lengths_of(document, many)),
            partial(_lengths, document=document, pairs=few),
            partial(_lengths, document=document, pairs=many),
            partial(_losses, document=document, few=few, many=many),
        ]
    if arms := groups["mask ratio"]:
        panels.append(partial(_mask_ratios, arms=arms, detail=f"{many} pairs, {_bridge_steps(arms[0])} bridge steps"))
    return panels


def _arms(document: Document, group: str, name: str | None = None) -> list[Document]:
    return [arm for arm in document["arms"] if arm["group"] == group and name in (None, arm["name"])]


def _lengths_of(document: Document, pairs: int) -> list[Document]:
    """Return the arms that have been through all three stages, by the length of their bridges."""
    return [arm for arm in _arms(document, "length", ALL_THREE) if arm["pairs"] == pairs]


def _bridge_steps(arm: Document) -> int:
    return next(stage["steps"] for stage in arm["stages"] if stage["stage"] == "bridge")


def _bars(axes: Axes, arms: Sequence[Document], title: str) -> None:
    for place, arm in enumerate(reversed(arms)):
        colour, found = COLOURS.get(arm["name"], OTHER), estimate(values(arm))
        axes.barh(place, found.mean, color=colour, alpha=0.35, height=0.62)
        axes.errorbar(found.mean, place, xerr=found.half_width or 0, color=colour, capsize=4, linewidth=1.6)
        axes.plot(values(arm), [place] * len(values(arm)), "o", color=colour, markersize=4, clip_on=False)
    axes.set_yticks(range(len(arms)), [fill(arm["name"], LABEL_WIDTH) for arm in reversed(arms)])
    axes.set_xlabel("recall@1")
    axes.set_xlim(0, 1)
    axes.set_title(title)


def _line(axes: Axes, points: Sequence[tuple[float, Sequence[float]]], name: str) -> None:
    """Draw means over x with their intervals, and each seed as a dot."""
    colour, found = COLOURS[name], [estimate(seeds) for _, seeds in points]
    axes.errorbar(
        [x for x, _ in points],
        [each.mean for each in found],
        yerr=[each.half_width or 0 for each in found],
        color=colour,
        capsize=4,
        linewidth=2,
        label=name,
        marker="s" if len(points) == 1 else None,
    )
    for x, seeds in points:
        axes.plot([x] * len(seeds), seeds, "o", color=colour, markersize=3.5, alpha=0.7)


def _pairs(axes: Axes, document: Document) -> None:
    for name in COLOURS:
        arms = _arms(document, "pairs", name)
        if arms:
            _line(axes, [(arm["pairs"], values(arm)) for arm in arms], name)
    axes.set_xscale("log")
    ticks = sorted({arm["pairs"] for arm in _arms(document, "pairs")})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("contrastive pairs")
    _recall_axis(axes)
    axes.set_title("Fewer pairs")


def _learned(axes: Axes, arms: Sequence[Document]) -> None:
    steps = [_bridge_steps(arm) for arm in arms]
    for name, (label, colour) in LEARNED.items():
        if all(bridge_values(arm, name) for arm in arms):
            axes.plot(steps, [fmean(bridge_values(arm, name)) for arm in arms], color=colour, linewidth=2, label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bridge steps")
    axes.set_title("What the bridge has learned")
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _lengths(axes: Axes, document: Document, pairs: int) -> None:
    """Draw recall over compute: a longer and longer bridge, and contrastive steps instead."""
    arms = [arm for arm in _arms(document, "length") if arm["pairs"] == pairs]
    alone = [arm for arm in document["arms"] if (arm["name"], arm["pairs"]) == (ALONE, pairs)][:1]
    for name in (ALL_THREE, EQUAL, NO_BRIDGE, ALONE):
        points = sorted((arm["flops"] / 1e12, values(arm)) for arm in (*arms, *alone) if arm["name"] == name)
        if points:
            _line(axes, points, name)
    axes.set_xlim(left=0)
    axes.set_xlabel("compute of the whole training (TFLOP)")
    _recall_axis(axes)
    axes.set_title(f"{pairs} pairs: a longer bridge, or contrastive steps")


def _losses(axes: Axes, document: Document, few: int, many: int) -> None:
    """Draw recall over the loss that the bridge has come to, each seed and length a dot."""
    for pairs, colour in ((few, FEW), (many, MANY)):
        arms = _lengths_of(document, pairs)
        losses = [loss for arm in arms for loss in bridge_values(arm, "loss")]
        recalls = [recall for arm in arms for recall in values(arm)]
        axes.plot(losses, recalls, "o", color=colour, markersize=5, alpha=0.75, label=f"{pairs} pairs")
    axes.invert_xaxis()
    axes.set_xlabel("the bridge's loss where it ended")
    _recall_axis(axes)
    axes.set_title("Recall after the contrastive stage, by the bridge's loss")
    axes.legend(fontsize=SMALL, frameon=False)


def _mask_ratios(axes: Axes, arms: Sequence[Document], detail: str) -> None:
    _line(axes, [(arm["x"], values(arm)) for arm in arms], ALL_THREE)
    axes.set_xticks([arm["x"] for arm in arms])
    _recall_axis(axes)
    axes.set_xlabel("share of block B's words that is hidden")
    axes.set_title(f"The bridge's mask ratio, {detail}")


def _recall_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.set_ylabel("recall@1")


def _style(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(10.5)
    axes.title.set_color(INK)
    axes.tick_params(colors=INK, length=0, labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(GRID)
