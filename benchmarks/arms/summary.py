"""Means with intervals over seeds, and tables of them."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from arms.grid import ALL_THREE, ALONE, EQUAL, NO_BRIDGE, Arm, Grid
from cocoa_embed.evaluation.significance import mean_intervals
from cocoa_embed.report.tables import Score, Table

LEVEL = 0.95
RESAMPLES = 1000
SCORED = ("recall@1", "recall@5", "recall@10", "mrr")
COMPARED: dict[str, str] = dict.fromkeys(("photographs", "settings"), "recall@10")
"""The metric of differences, if not recall@1: small models find few of a thousand photographs at rank 1."""

TITLES = {
    "stages": "The stages",
    "variants": "Variants of the method",
    "mask ratio": "The bridge's mask ratio",
    "pairs": "Fewer pairs",
    "length": "The bridge's length, and the same compute spent on contrastive steps",
    "photographs": "The stages on photographs",
    "settings": "What may make the bridge pay, at equal compute",
}
BRIDGE_COLUMNS = ["bridge: loss", "bridge: matching minus shuffled image"]
SHORT = {ALONE: "contrastive only", EQUAL: "equal compute", NO_BRIDGE: "no bridge", ALL_THREE: "all three"}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its confidence interval (Student's t); None for a single seed."""

    mean: float
    half_width: float | None

    def text(self, sign: str = "") -> str:
        """Return the estimate as text, with a sign if ``sign`` is ``+``."""
        return f"{self.mean:{sign}.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent repetitions with its confidence interval."""
    if len(values) < 2:
        return Estimate(fmean(values), None)
    width = t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / sqrt(len(values))
    return Estimate(fmean(values), float(width))


def results_document(grid: Grid, outcomes: Sequence[Sequence[Mapping[str, Any] | None]]) -> dict[str, Any]:
    """Return the results of the arms: each seed's outcome, their mean, and paired differences to other arms.

    :param outcomes: One outcome per seed for each arm of the grid; None if it is unfinished.
    """
    finished = ([each for each in seeds if each is not None] for seeds in outcomes)
    of_arm = {arm: found for arm, found in zip(grid.arms, finished, strict=True) if found}
    return {
        "sizes": {"pairs": grid.sizes.pairs, "training": grid.sizes.training, "held_out": grid.sizes.held_out},
        "flops_per_row": dict(grid.flops_per_row),
        "batch_sizes": dict(grid.batch_sizes),
        "mask_ratio": grid.mask_ratio,
        "level": LEVEL,
        "arms": [_arm_document(grid, arm, of_arm) for arm in of_arm],
    }


def _arm_document(grid: Grid, arm: Arm, outcomes: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    ours = outcomes[arm]
    differences, of_images, compared = {}, {}, COMPARED.get(arm.group, "recall@1")
    for other in (other for other in grid.references(arm) if other in outcomes):
        theirs = {outcome["seed"]: outcome for outcome in outcomes[other]}
        pairs = [(each, theirs[each["seed"]]) for each in ours if each["seed"] in theirs]
        if pairs:
            differences[other.name] = estimate([one[compared] - two[compared] for one, two in pairs])._asdict()
        if pairs and "images" in ours[0]:
            column = SCORED.index(compared)
            changes = [(_of_images([one]) - _of_images([two]))[:, :, column].mean(axis=1) for one, two in pairs]
            of_images[other.name] = _interval(np.mean(changes, axis=0)[:, None])[0]
    return {
        "group": arm.group,
        "name": arm.name,
        "pairs": grid.pairs(arm.fraction),
        "x": arm.x,
        "stages": [{"stage": run.stage, "steps": steps, "settings": list(run.settings)} for run, steps in arm.chain],
        "flops": grid.flops(arm),
        "recall@1": estimate([each["recall@1"] for each in ours])._asdict(),
        "differences": differences,
        **({"captions": arm.captions, **_over_images(ours, of_images)} if "images" in ours[0] else {}),
        "outcomes": [{name: value for name, value in each.items() if name != "images"} for each in ours],
    }


def _over_images(outcomes: Sequence[Mapping[str, Any]], differences: Mapping[str, Any]) -> dict[str, Any]:
    """Return means and intervals over the images that all seeds measure on; an image keeps all its captions."""
    values = _of_images(outcomes)
    ends = _interval(values.reshape(len(values), -1))
    cells = iter(zip(values.mean(axis=0).ravel().tolist(), ends, strict=True))
    scores = {way: {name: next(cells) for name in SCORED} for way in outcomes[0]["directions"]}
    return {"scores": scores, "difference_intervals": dict(differences)}


def _of_images(outcomes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    values: np.ndarray = np.mean([outcome["images"] for outcome in outcomes], axis=0)
    return values


def _interval(values: np.ndarray) -> list[list[float]]:
    images = np.arange(len(values))
    found: list[list[float]] = mean_intervals(values, images, np.random.default_rng(0), RESAMPLES).tolist()
    return found


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
    data, metrics, cells_of, notes = ["pairs"], ["recall@1", "mrr"], _seed_cells, _notes(document, references)
    if group in COMPARED:
        arms.sort(key=lambda arm: (-arm["captions"], arm["pairs"]))
        ways = [f"{way.replace('_', ' ').replace(' to ', ' → ')} {name}" for way, name in _columns(arms[0])]
        data, metrics, cells_of, notes = ["images", "captions", "seeds"], ways, _image_cells, IMAGE_NOTES
    # A bridge that masks more has a harder task, so metrics of bridges with different ratios are not comparable.
    bridge = [] if group == "mask ratio" else BRIDGE_COLUMNS
    rows = []
    for arm in arms:
        steps = " + ".join(f"{stage['steps']}" for stage in arm["stages"])
        about = [str(arm["pairs"]), f"{arm.get('captions', 1):g}", str(len(arm["outcomes"]))][: len(data)]
        cost = [steps, f"{arm['flops'] / 1e12:.1f}", f"{fmean(values(arm, 'seconds')) / 60:.1f}"]
        differences = [_difference(arm, name) for name in references]
        rows.append([arm["name"], *about, *cost, *cells_of(arm), *differences, *_bridge_cells(arm)[: len(bridge)]])
    header = ["arm", *data, "steps", "TFLOP", "minutes", *metrics]
    header += [f"difference to {SHORT.get(name, name)}" for name in references]
    return Table(title, header + bridge, rows, notes)


def _columns(arm: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(way, name) for way in arm["scores"] for name in SCORED[:-1]]


def _image_cells(arm: Mapping[str, Any]) -> list[Score]:
    scores = (arm["scores"][way][name] for way, name in _columns(arm))
    return [Score(f"{mean:.3f}", mean, f"{low:.3f}–{high:.3f}") for mean, (low, high) in scores]


def _seed_cells(arm: Mapping[str, Any]) -> list[Score]:
    found = (estimate(values(arm, name)) for name in ("recall@1", "mrr"))
    return [Score(each.text(), each.mean) for each in found]


IMAGE_NOTES = [
    "Every caption of the held-out images is a query, and an image is the right answer for all of its captions;"
    f" recall@k: whether a right answer is among the first k. Means over seeds, with {LEVEL:.0%} bootstrap intervals"
    " over images, each with all its captions. Bold: the best of a column.",
    "images, captions: of the contrastive pairs; the bridge trains on all images and captions, unless stated"
    " otherwise. difference to ...: of recall@10, mean of both directions, with its interval over images, and ±"
    " over seeds (Student's t).",
]


def _difference(arm: Mapping[str, Any], name: str) -> str | Score:
    if name not in arm["differences"]:
        return ""
    text = Estimate(**arm["differences"][name]).text("+")
    if "difference_intervals" not in arm:
        return text
    low, high = arm["difference_intervals"][name]
    return Score(text, detail=f"{low:+.3f} to {high:+.3f}")


def _bridge_cells(arm: Mapping[str, Any]) -> tuple[str, str]:
    losses, matching, shuffled = (
        bridge_values(arm, name) for name in ("loss", "accuracy_matching_image", "accuracy_shuffled_image")
    )
    gains = [a - b for a, b in zip(matching, shuffled, strict=True)]
    return f"{fmean(losses):.3f}" if losses else "", estimate(gains).text("+") if gains else ""


def _notes(document: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    seeds, others = len(document["seeds"]), document["processes"] - 1
    beside = f" with {others} other process{'es' * (others > 1)} running" if others else ""
    steps = f"steps: of the stages in order. minutes: of training{beside}, probes included."
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
