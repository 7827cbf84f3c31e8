"""The ablation's figure, drawn from its results alone."""

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
from arms.photos import ONLY_PAIRS
from arms.summary import TITLES, bridge_values, estimate, values

COLOURS = {ALL_THREE: "#1d8a4a", EQUAL: "#c8690f", ALONE: "#8d837b", CAPTIONS_AS_PAIRS: "#8447a8", NO_BRIDGE: "#2c66c4"}
COLOURS[ONLY_PAIRS] = "#b3261e"
BRIDGE_LINES = {
    "loss": ("loss on masked tokens", "#57493f"),
    "accuracy_matching_image": ("accuracy, matching image", "#1d8a4a"),
    "accuracy_shuffled_image": ("accuracy, shuffled image", "#8d837b"),
    "accuracy_no_image": ("accuracy, no image", "#c8690f"),
}
FEW, MANY, OTHER, INK, LIGHT = "#b3261e", "#2c66c4", "#57493f", "#2b211b", "#e6ddd4"
STYLE = {
    "svg.hashsalt": "ablation",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "grid.color": LIGHT,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}

Document = Mapping[str, Any]


def figure_svg(document: Document) -> str:
    """Draw the groups of arms in the results as SVG; equal results give equal text."""
    svg = StringIO()
    with matplotlib.rc_context(STYLE):
        draw(document).savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def draw(document: Document) -> Figure:
    """Draw the groups of arms in the results, two panels per row."""
    panels = _panels(document)
    rows = ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.5 * rows + 0.5), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(rows, 2, number))
    names = {arm["name"] for arm in document["arms"]}
    lines = [Line2D([], [], color=COLOURS[name], linewidth=3, label=name) for name in COLOURS if name in names]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=10)
    title = f"What each stage is worth: {len(document['seeds'])} seeds, means with 95 % intervals, each seed a dot"
    figure.suptitle(title, fontsize=14, color=INK)
    return figure


def _panels(document: Document) -> list[Callable[[Axes], None]]:
    groups = {group: _arms(document, group) for group in TITLES}
    many = document["sizes"]["pairs"]
    panels: list[Callable[[Axes], None]] = []
    if arms := groups["stages"]:
        panels.append(partial(_bars, arms=arms, title=f"The stages, {many} pairs"))
    if arms := groups["variants"]:
        title = f"Variants, {many} pairs, {_bridge_steps(arms[0])} bridge steps"
        panels.append(partial(_bars, arms=arms, title=title))
    if arms := groups["pairs"]:
        panels.append(partial(_pairs, arms=arms))
    if arms := groups["length"]:
        few = min(arm["pairs"] for arm in arms)
        panels += [
            partial(_bridge, arms=_lengths_of(document, many)),
            partial(_lengths, document=document, pairs=few),
            partial(_lengths, document=document, pairs=many),
            partial(_losses, document=document, few=few, many=many),
        ]
    for captions in sorted({arm["captions"] for arm in groups["photographs"]}, reverse=True):
        same = [arm for arm in groups["photographs"] if arm["captions"] == captions]
        panels.append(partial(_photographs, arms=same, title=f"{captions:g} caption{'s' * (captions != 1)} an image"))
    if arms := groups["mask ratio"]:
        panels.append(partial(_mask_ratios, arms=arms, detail=f"{many} pairs, {_bridge_steps(arms[0])} bridge steps"))
    return panels


def _arms(document: Document, group: str, name: str | None = None) -> list[Document]:
    return [arm for arm in document["arms"] if arm["group"] == group and name in (None, arm["name"])]


def _lengths_of(document: Document, pairs: int) -> list[Document]:
    """Return the arms with all three stages, in order of the bridge's length."""
    return [arm for arm in _arms(document, "length", ALL_THREE) if arm["pairs"] == pairs]


def _bridge_steps(arm: Document) -> int:
    return next(stage["steps"] for stage in arm["stages"] if stage["stage"] == "bridge")


def _bars(axes: Axes, arms: Sequence[Document], title: str) -> None:
    for y, arm in enumerate(reversed(arms)):
        colour, found = COLOURS.get(arm["name"], OTHER), estimate(values(arm))
        axes.barh(y, found.mean, color=colour, alpha=0.35, height=0.62)
        axes.errorbar(found.mean, y, xerr=found.half_width or 0, color=colour, capsize=4, linewidth=1.6)
        axes.plot(values(arm), [y] * len(values(arm)), "o", color=colour, markersize=4, clip_on=False)
    axes.set_yticks(range(len(arms)), [fill(arm["name"], 22) for arm in reversed(arms)])
    axes.set(xlabel="recall@1", xlim=(0, 1), title=title)


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
    axes.set(ylim=(0, 1), ylabel="recall@1")


def _pairs(axes: Axes, arms: Sequence[Document], metric: str = "recall@1") -> None:
    for name in COLOURS:
        if points := sorted((arm["pairs"], values(arm, metric)) for arm in arms if arm["name"] == name):
            _line(axes, points, name)
    axes.set_xscale("log")
    ticks = sorted({arm["pairs"] for arm in arms})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="contrastive pairs", title="Fewer pairs")


def _photographs(axes: Axes, arms: Sequence[Document], title: str) -> None:
    _pairs(axes, arms, "recall@10")
    axes.autoscale(axis="y")
    axes.set(ylim=(0, None), xlabel="images", ylabel="recall@10", title=title)


def _bridge(axes: Axes, arms: Sequence[Document]) -> None:
    steps = [_bridge_steps(arm) for arm in arms]
    for name, (label, colour) in BRIDGE_LINES.items():
        if all(bridge_values(arm, name) for arm in arms):
            axes.plot(steps, [fmean(bridge_values(arm, name)) for arm in arms], color=colour, linewidth=2, label=label)
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="bridge steps", title="What the bridge has learned")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _lengths(axes: Axes, document: Document, pairs: int) -> None:
    """Draw recall over compute: longer bridges, and contrastive steps instead."""
    arms = [arm for arm in _arms(document, "length") if arm["pairs"] == pairs]
    alone = [arm for arm in document["arms"] if (arm["name"], arm["pairs"]) == (ALONE, pairs)][:1]
    for name in (ALL_THREE, EQUAL, NO_BRIDGE, ALONE):
        points = sorted((arm["flops"] / 1e12, values(arm)) for arm in (*arms, *alone) if arm["name"] == name)
        if points:
            _line(axes, points, name)
    title = f"{pairs} pairs: a longer bridge, or contrastive steps"
    axes.set(xlim=(0, None), xlabel="compute of the whole training (TFLOP)", title=title)


def _losses(axes: Axes, document: Document, few: int, many: int) -> None:
    """Draw recall over the final loss of the bridge, one dot per seed and length."""
    for pairs, colour in ((few, FEW), (many, MANY)):
        arms = _lengths_of(document, pairs)
        losses = [loss for arm in arms for loss in bridge_values(arm, "loss")]
        recalls = [recall for arm in arms for recall in values(arm)]
        axes.plot(losses, recalls, "o", color=colour, markersize=5, alpha=0.75, label=f"{pairs} pairs")
    axes.invert_xaxis()
    axes.set(xlabel="final loss of the bridge", ylim=(0, 1), ylabel="recall@1", title="Recall by the bridge's loss")
    axes.legend()


def _mask_ratios(axes: Axes, arms: Sequence[Document], detail: str) -> None:
    _line(axes, [(arm["x"], values(arm)) for arm in arms], ALL_THREE)
    axes.set_xticks([arm["x"] for arm in arms])
    axes.set(xlabel="masked ratio of block B", title=f"Bridge mask ratio, {detail}")
