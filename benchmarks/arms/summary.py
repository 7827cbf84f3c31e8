"""From raw outcomes to means with intervals, and to tables."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

from arms.grid import ALL_THREE, ALONE, EQUAL, NO_BRIDGE, Arm, Grid
from cocoa_embed.report.tables import Table

LEVEL = 0.95
TITLES = {
    "stages": "The stages",
    "variants": "Variants of the method",
    "mask ratio": "The bridge's mask ratio",
    "pairs": "Fewer pairs",
    "length": "The bridge's length, and the same compute spent on contrastive steps",
}
SHORT = {ALONE: "alone", EQUAL: "equal compute", NO_BRIDGE: "no bridge", ALL_THREE: "all three"}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its confidence interval (Student's t); None for a single seed."""

    mean: float
    half_width: float | None

    def told(self, sign: str = "") -> str:
        """Return it for people."""
        return f"{self.mean:{sign}.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent repetitions with its confidence interval."""
    if len(values) < 2:
        return Estimate(fmean(values), None)
    width = t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / sqrt(len(values))
    return Estimate(fmean(values), float(width))


def results_document(grid: Grid, outcomes: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the results of all arms: what each is, each seed's outcome, their mean, and paired differences.

    :param outcomes: Of each arm of the grid, one a seed.
    """
    of_arm = dict(zip(grid.arms, outcomes, strict=True))
    return {
        "sizes": {"pairs": grid.sizes.pairs, "training": grid.sizes.training, "held_out": grid.sizes.held_out},
        "flops_per_row": dict(grid.per_row),
        "batch_sizes": dict(grid.batch_sizes),
        "mask_ratio": grid.mask_ratio,
        "level": LEVEL,
        "arms": [_arm_document(grid, arm, of_arm) for arm in grid.arms],
    }


def _arm_document(grid: Grid, arm: Arm, outcomes: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    references = grid.references(arm)
    recalls = {each: [outcome["recall@1"] for outcome in outcomes[each]] for each in (arm, *references)}
    own = recalls[arm]
    less = {
        other.name: estimate([ours - theirs for ours, theirs in zip(own, recalls[other], strict=True)])._asdict()
        for other in references
    }
    return {
        "group": arm.group,
        "name": arm.name,
        "pairs": grid.pairs(arm.share),
        "x": arm.x,
        "stages": [{"stage": run.stage, "steps": steps, "settings": list(run.settings)} for run, steps in arm.steps()],
        "flops": grid.flops(arm),
        "recall@1": estimate(own)._asdict(),
        "less": less,
        "outcomes": list(outcomes[arm]),
    }


def values(arm: Mapping[str, Any], name: str = "recall@1") -> list[float]:
    """Return a metric of an arm, a value for each seed."""
    return [outcome[name] for outcome in arm["outcomes"]]


def bridge_values(arm: Mapping[str, Any], name: str) -> list[float]:
    """Return a figure of the bridge that an arm went through, a value for each seed; none where it has no bridge."""
    return [outcome["bridge"][name] for outcome in arm["outcomes"] if name in outcome["bridge"]]


def carried(arm: Mapping[str, Any]) -> list[float]:
    """Return how many more of the hidden words the right image tells than another, for each seed; see METHOD.md."""
    right, other = (bridge_values(arm, f"accuracy_{which}_image") for which in ("matching", "shuffled"))
    return [ours - theirs for ours, theirs in zip(right, other, strict=True)]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return a table for each group of arms."""
    found = {arm["group"] for arm in document["arms"]}
    return [_table(document, group, title) for group, title in TITLES.items() if group in found]


def _table(document: Mapping[str, Any], group: str, title: str) -> Table:
    arms = [arm for arm in document["arms"] if arm["group"] == group]
    references = list(dict.fromkeys(name for arm in arms for name in arm["less"]))
    header = ["arm", "pairs", "steps", "TFLOP", "minutes", "recall@1", "mrr"]
    header += [f"less {SHORT.get(name, name)}" for name in references]
    # A bridge that hides more has the harder task, so its own figures tell nothing beside those of one that hides less.
    learned = [] if group == "mask ratio" else ["bridge: loss", "right less another image"]
    rows = []
    for arm in arms:
        less = {name: Estimate(**found).told("+") for name, found in arm["less"].items()}
        rows.append(
            [
                arm["name"],
                str(arm["pairs"]),
                " + ".join(f"{stage['steps']}" for stage in arm["stages"]),
                f"{arm['flops'] / 1e12:.1f}",
                f"{fmean(values(arm, 'seconds')) / 60:.1f}",
                estimate(values(arm)).told(),
                estimate(values(arm, "mrr")).told(),
                *(less.get(name, "") for name in references),
                *_learned(arm)[: len(learned)],
            ]
        )
    return Table(title, header + learned, rows, notes=_notes(document, references))


def _learned(arm: Mapping[str, Any]) -> tuple[str, str]:
    if not bridge_values(arm, "loss"):
        return "", ""
    return f"{fmean(bridge_values(arm, 'loss')):.3f}", estimate(carried(arm)).told("+")


def _notes(document: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    seeds, others = len(document["seeds"]), document["processes"] - 1
    minutes = "minutes: of training, " + (f"beside {others} other{'s' * (others > 1)}, " if others else "")
    told = f"steps: of the stages in their order. {minutes}probes included."
    if seeds == 1:
        notes = [f"recall@1: mean of both directions, of one seed. {told}"]
        return notes + (["less ...: the difference."] if references else [])
    of_own = "data, order and hidden tokens" if isinstance(document["data"], str) else "order and hidden tokens"
    notes = [
        f"recall@1: mean of both directions, then over {seeds} seeds with its {LEVEL:.0%} interval (Student's t); each"
        f" seed has its own {of_own}. {told}"
    ]
    return notes + (
        ["less ...: the mean of the differences seed by seed, with its own interval."] if references else []
    )
