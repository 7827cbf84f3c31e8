"""Means with intervals over seeds, and tables of them."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

from arms.grid import ALL_THREE, ALONE, EQUAL, NO_BRIDGE, Arm, Grid
from cocoa_embed.report.tables import Score, Table

LEVEL = 0.95
TITLES = {
    "stages": "The stages",
    "variants": "Variants of the method",
    "mask ratio": "The bridge's mask ratio",
    "pairs": "Fewer pairs",
    "length": "The bridge's length, and the same compute spent on contrastive steps",
}
SHORT = {ALONE: "contrastive only", EQUAL: "equal compute", NO_BRIDGE: "no bridge", ALL_THREE: "all three"}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its confidence interval (Student's t); None for a single seed."""

    mean: float
    half_width: float | None

    def text(self, sign: str = "") -> str:
        """Format it."""
        return f"{self.mean:{sign}.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent repetitions with its confidence interval."""
    if len(values) < 2:
        return Estimate(fmean(values), None)
    width = t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / sqrt(len(values))
    return Estimate(fmean(values), float(width))


def results_document(grid: Grid, outcomes: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the results of all arms: each seed's outcome, their mean, and paired differences to other arms.

    :param outcomes: For each arm of the grid, one for each seed.
    """
    of_arm = dict(zip(grid.arms, outcomes, strict=True))
    return {
        "sizes": {"pairs": grid.sizes.pairs, "training": grid.sizes.training, "held_out": grid.sizes.held_out},
        "flops_per_row": dict(grid.flops_per_row),
        "batch_sizes": dict(grid.batch_sizes),
        "mask_ratio": grid.mask_ratio,
        "level": LEVEL,
        "arms": [_arm_document(grid, arm, of_arm) for arm in grid.arms],
    }


def _arm_document(grid: Grid, arm: Arm, outcomes: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    ours = [outcome["recall@1"] for outcome in outcomes[arm]]
    differences = {}
    for other in grid.references(arm):
        theirs = [outcome["recall@1"] for outcome in outcomes[other]]
        differences[other.name] = estimate([a - b for a, b in zip(ours, theirs, strict=True)])._asdict()
    return {
        "group": arm.group,
        "name": arm.name,
        "pairs": grid.pairs(arm.fraction),
        "x": arm.x,
        "stages": [{"stage": run.stage, "steps": steps, "settings": list(run.settings)} for run, steps in arm.chain],
        "flops": grid.flops(arm),
        "recall@1": estimate(ours)._asdict(),
        "differences": differences,
        "outcomes": list(outcomes[arm]),
    }


def values(arm: Mapping[str, Any], name: str = "recall@1") -> list[float]:
    """Return a metric of an arm, one value for each seed."""
    return [outcome[name] for outcome in arm["outcomes"]]


def bridge_values(arm: Mapping[str, Any], name: str) -> list[float]:
    """Return a metric of the arm's bridge, one value for each seed; empty for arms without a bridge."""
    return [outcome["bridge"][name] for outcome in arm["outcomes"] if name in outcome["bridge"]]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return a table for each group of arms."""
    groups = {arm["group"] for arm in document["arms"]}
    return [_table(document, group, title) for group, title in TITLES.items() if group in groups]


def _table(document: Mapping[str, Any], group: str, title: str) -> Table:
    arms = [arm for arm in document["arms"] if arm["group"] == group]
    references = list(dict.fromkeys(name for arm in arms for name in arm["differences"]))
    header = ["arm", "pairs", "steps", "TFLOP", "minutes", "recall@1", "mrr"]
    header += [f"difference to {SHORT.get(name, name)}" for name in references]
    # A bridge that masks more has the harder task, so metrics of bridges with different ratios do not compare.
    bridge = [] if group == "mask ratio" else ["bridge: loss", "bridge: matching minus shuffled image"]
    rows = []
    for arm in arms:
        differences = {name: Estimate(**found).text("+") for name, found in arm["differences"].items()}
        rows.append(
            [
                arm["name"],
                str(arm["pairs"]),
                " + ".join(f"{stage['steps']}" for stage in arm["stages"]),
                f"{arm['flops'] / 1e12:.1f}",
                f"{fmean(values(arm, 'seconds')) / 60:.1f}",
                *(Score(found.text(), found.mean) for found in (estimate(values(arm)), estimate(values(arm, "mrr")))),
                *(differences.get(name, "") for name in references),
                *_bridge_cells(arm)[: len(bridge)],
            ]
        )
    return Table(title, header + bridge, rows, notes=_notes(document, references))


def _bridge_cells(arm: Mapping[str, Any]) -> tuple[str, str]:
    losses, matching, shuffled = (
        bridge_values(arm, name) for name in ("loss", "accuracy_matching_image", "accuracy_shuffled_image")
    )
    if not losses:
        return "", ""
    return f"{fmean(losses):.3f}", estimate([a - b for a, b in zip(matching, shuffled, strict=True)]).text("+")


def _notes(document: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    seeds, others = len(document["seeds"]), document["processes"] - 1
    beside = f" beside {others} other process{'es' * (others > 1)}" if others else ""
    steps = f"steps: of the stages in their order. minutes: of training{beside}, probes included."
    steps += " Bold: the best of a column."
    if seeds == 1:
        notes = [f"recall@1: mean of both directions, of one seed. {steps}", "difference to ...: of recall@1."]
    else:
        drawn = "data, order and masks" if isinstance(document["data"], str) else "order and masks"
        notes = [
            f"recall@1: mean of both directions, then over {seeds} seeds with its {LEVEL:.0%} interval (Student's t);"
            f" each seed has its own {drawn}. {steps}",
            "difference to ...: mean of the differences of recall@1 seed by seed, with its own interval.",
        ]
    return notes if references else notes[:1]
