"""The ablation's figure, from the results' file alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arms.grid import ALL_THREE, ALONE, CAPTIONS_AS_PAIRS, EQUAL
from arms.summary import bridge_values, estimate, values

COLOURS = {ALL_THREE: "#1d8a4a", EQUAL: "#c8690f", ALONE: "#8d837b", CAPTIONS_AS_PAIRS: "#8447a8"}
LINES = (ALL_THREE, EQUAL, ALONE, CAPTIONS_AS_PAIRS)
LABEL_WIDTH = 22
INK = "#2b211b"
GRID = "#e6ddd4"


def write_figure(document: Mapping[str, Any], path: Path) -> None:
    """Draw all groups of arms into one file."""
    draw(document).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(document: Mapping[str, Any]) -> Figure:
    """Draw all groups of arms."""
    figure = Figure(figsize=(11, 14.5), layout="constrained")
    axes = figure.subplot_mosaic([["stages", "variants"], ["pairs", "bridge"], ["few", "many"], ["mask", "."]])
    _bars(axes["stages"], _arms(document, "stages"), "The stages, all pairs")
    _bars(axes["variants"], _arms(document, "variants"), f"Variants, all pairs{_bridge_text(document)}")
    _pairs(axes["pairs"], document)
    shares = sorted({arm["share_of_pairs"] for arm in _arms(document, "length")})
    for name, share in zip(("few", "many"), (shares[0], shares[-1]), strict=True):
        _lengths(axes[name], document, share)
    _bridge(axes["bridge"], document, shares[-1])
    _mask_ratios(axes["mask"], _arms(document, "mask ratio"), _bridge_text(document))
    for each in axes.values():
        _style(each)
    seeds = len(document["seeds"])
    lines = [Line2D([], [], color=COLOURS[name], linewidth=3, label=name) for name in LINES]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(
        f"What each stage is worth: {seeds} seeds, means with 95 % intervals, each seed a dot", fontsize=14, color=INK
    )
    return figure


def _arms(document: Mapping[str, Any], group: str) -> list[Mapping[str, Any]]:
    return [arm for arm in document["arms"] if arm["group"] == group]


def _bridge_text(document: Mapping[str, Any]) -> str:
    """Say how long the bridges of variants are."""
    arm = next(arm for arm in _arms(document, "variants") if arm["name"] == ALL_THREE)
    return f", {_bridge_steps(arm)} bridge steps"


def _bridge_steps(arm: Mapping[str, Any]) -> int:
    return next(stage["steps"] for stage in arm["stages"] if stage["stage"] == "bridge")


def _bars(axes: Axes, arms: Sequence[Mapping[str, Any]], title: str) -> None:
    for place, arm in enumerate(reversed(arms)):
        _bar(axes, place, values(arm), COLOURS.get(arm["name"], "#57493f"))
    axes.set_yticks(range(len(arms)), [fill(arm["name"], LABEL_WIDTH) for arm in reversed(arms)])
    axes.set_xlabel("recall@1")
    axes.set_xlim(0, 1)
    axes.set_title(title)


def _bar(axes: Axes, place: float, seeds: Sequence[float], colour: str) -> None:
    found = estimate(seeds)
    axes.barh(place, found.mean, color=colour, alpha=0.35, height=0.62)
    axes.errorbar(found.mean, place, xerr=found.half_width or 0, color=colour, capsize=4, linewidth=1.6)
    axes.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=4, clip_on=False)


def _line(axes: Axes, points: Sequence[tuple[float, Sequence[float]]], name: str) -> None:
    """Draw means over x with their intervals, and each seed as a dot."""
    colour = COLOURS[name]
    found = [estimate(seeds) for _, seeds in points]
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


def _pairs(axes: Axes, document: Mapping[str, Any]) -> None:
    total = document["sizes"]["pairs"]
    for name in LINES:
        arms = [arm for arm in _arms(document, "pairs") if arm["name"] == name]
        if arms:
            _line(axes, [(arm["share_of_pairs"] * total, values(arm)) for arm in arms], name)
    axes.set_xscale("log")
    ticks = sorted({round(arm["share_of_pairs"] * total) for arm in _arms(document, "pairs")})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("contrastive pairs")
    _recall_axis(axes)
    axes.set_title("Fewer pairs")


def _lengths(axes: Axes, document: Mapping[str, Any], share: float) -> None:
    arms = [arm for arm in _arms(document, "length") if arm["share_of_pairs"] == share]
    for name in (ALL_THREE, EQUAL):
        points = sorted((arm["flops"] / 1e12, values(arm)) for arm in arms if arm["name"] == name)
        _line(axes, points, name)
    alone = next(arm for arm in _arms(document, "pairs") if arm["name"] == ALONE and arm["share_of_pairs"] == share)
    _line(axes, [(alone["flops"] / 1e12, values(alone))], ALONE)
    axes.set_xlim(left=0)
    axes.set_xlabel("compute of the whole training (TFLOP)")
    _recall_axis(axes)
    axes.set_title(f"{_pairs_text(document, share)}: a longer bridge, or contrastive steps")


def _pairs_text(document: Mapping[str, Any], share: float) -> str:
    return f"{round(share * document['sizes']['pairs'])} pairs"


def _bridge(axes: Axes, document: Mapping[str, Any], share: float) -> None:
    arms = [arm for arm in _arms(document, "length") if arm["share_of_pairs"] == share and arm["name"] == ALL_THREE]
    steps = [_bridge_steps(arm) for arm in arms]
    drawn = {
        "loss on hidden words": ("loss", "#57493f"),
        "words right, right image": ("accuracy_right_image", "#1d8a4a"),
        "words right, another image": ("accuracy_shuffled_image", "#8d837b"),
        "words right, no image": ("accuracy_no_image", "#c8690f"),
    }
    for label, (name, colour) in drawn.items():
        if all(bridge_values(arm, name) for arm in arms):
            axes.plot(steps, [fmean(bridge_values(arm, name)) for arm in arms], color=colour, linewidth=2, label=label)
    axes.plot(
        steps, [fmean(values(arm)) for arm in arms], "--", color="#b3261e", linewidth=2, label="recall@1 from there"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bridge steps")
    axes.set_title(f"What the bridge has learned ({_pairs_text(document, share)})")
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _mask_ratios(axes: Axes, arms: Sequence[Mapping[str, Any]], bridge: str) -> None:
    _line(axes, [(arm["x"], values(arm)) for arm in arms], ALL_THREE)
    axes.set_xticks([arm["x"] for arm in arms])
    _recall_axis(axes)
    axes.set_xlabel("share of block B's words that is hidden")
    axes.set_title(f"The bridge's mask ratio, all pairs{bridge}")


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
