"""From raw outcomes to means with intervals, and to tables."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

from arms.grid import ALONE, Arm, Grid
from cocoa_embed.evaluation.tables import Table

LEVEL = 0.95
TITLES = {
    "stages": "The stages",
    "variants": "Variants of the method",
    "mask ratio": "The bridge's mask ratio",
    "pairs": "Fewer pairs",
    "length": "The bridge's length, and the same compute spent on contrastive steps",
}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its confidence interval (Student's t); None for a single seed."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent repetitions with its confidence interval."""
    if len(values) < 2:
        return Estimate(fmean(values), None)
    width = t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / sqrt(len(values))
    return Estimate(fmean(values), float(width))


def arm_document(grid: Grid, arm: Arm, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an arm as the results' file holds it: what it is, each seed's outcome, and their mean."""
    recall = estimate([outcome["recall@1"] for outcome in outcomes])
    return {
        "group": arm.group,
        "name": arm.name,
        "share_of_pairs": arm.share,
        "x": arm.x,
        "stages": [{"stage": run.stage, "steps": steps, "settings": list(run.settings)} for run, steps in arm.steps()],
        "flops": arm.flops(grid.per_step),
        "recall@1": {"mean": recall.mean, "half_width": recall.half_width, "level": LEVEL},
        "seeds": list(outcomes),
    }


def values(arm: Mapping[str, Any], name: str = "recall@1") -> list[float]:
    """Return a metric of an arm, a value for each seed."""
    return [outcome[name] for outcome in arm["seeds"]]


def bridge_values(arm: Mapping[str, Any], name: str) -> list[float]:
    """Return a figure of the bridge that an arm went through, a value for each seed; none where it has no bridge."""
    return [outcome["bridge"][name] for outcome in arm["seeds"] if name in outcome["bridge"]]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return a table for each group of arms."""
    return [_table(document, group, title) for group, title in TITLES.items()]


def _table(document: Mapping[str, Any], group: str, title: str) -> Table:
    arms = [arm for arm in document["arms"] if arm["group"] == group]
    alone = next(arm for arm in document["arms"] if arm["group"] == "stages" and arm["name"] == ALONE)
    header = ["arm", "pairs", "steps", "TFLOP", "minutes", "recall@1", "mrr"]
    differs = group in ("stages", "variants", "mask ratio")
    header += ["against contrastive only"] if differs else []
    header += ["bridge: loss", "right image less another"]
    rows = []
    for arm in arms:
        row = [
            arm["name"],
            str(round(arm["share_of_pairs"] * document["sizes"]["pairs"])),
            " + ".join(f"{stage['steps']}" for stage in arm["stages"]),
            f"{arm['flops'] / 1e12:.1f}",
            f"{fmean(values(arm, 'seconds')) / 60:.1f}",
            str(estimate(values(arm))),
            str(estimate(values(arm, "mrr"))),
        ]
        if differs:
            gained = estimate([ours - theirs for ours, theirs in zip(values(arm), values(alone), strict=True)])
            row.append("" if arm["name"] == ALONE else f"{gained.mean:+.3f} ± {gained.half_width or 0:.3f}")
        rows.append([*row, *_bridge_cells(arm)])
    notes = [
        f"recall@1: mean of both directions, then over {len(document['seeds'])} seeds with its {LEVEL:.0%} interval"
        " (Student's t); each seed has its own data, order and hidden tokens. steps: of the stages in their order."
    ]
    if differs:
        notes.append("against contrastive only: the mean of the differences seed by seed, with its own interval.")
    return Table(title, header, rows, notes=notes)


def _bridge_cells(arm: Mapping[str, Any]) -> list[str]:
    loss = bridge_values(arm, "loss")
    right, other = (bridge_values(arm, f"accuracy_{which}_image") for which in ("right", "shuffled"))
    if not right:
        return [f"{fmean(loss):.3f}" if loss else "", ""]
    return [f"{fmean(loss):.3f}", f"{fmean(right) - fmean(other):+.3f}"]
