import math
import re

import numpy as np
import pytest
from run_records import stage

from cocoa_embed.report.charts import measures, plateau_panel, read_curves, smoothed, stage_panels
from cocoa_embed.report.words import MATCHING, NO_IMAGE, SHUFFLED, duration

pytest.importorskip("matplotlib")


def test_losses_and_accuracies_of_a_stage_have_a_panel_each_and_probes_their_own() -> None:
    warmup = stage("loss", "new_loss", "learning_rate", "train_loss", "seen_accuracy", "alignment")
    found = read_curves(
        {"warmup": warmup, "bridge": stage("loss", MATCHING, SHUFFLED, NO_IMAGE), "later": stage(log=[])}
    )
    panels = stage_panels(found)
    shown = [(panel.title, panel.quantity, [line.label for line in panel.lines]) for panel in panels]
    assert shown == [
        ("warmup", "loss", ["total loss", "new loss"]),
        ("warmup", "accuracy", ["seen accuracy"]),
        ("bridge", "loss", ["total loss"]),
    ]
    assert panels[0].detail == "495 steps in 1 min 15 s"
    assert "var(--total)" in panels[0].svg
    assert "#0102" not in panels[0].svg, "the colours are those of the page"
    plateau = plateau_panel(found)
    assert plateau is not None
    assert len(plateau.lines) == 3
    assert plateau_panel(found[:1]) is None


def test_only_finite_values_are_drawn_and_a_single_one_has_a_tick_at_its_step() -> None:
    log = [{"step": 7, "loss": 1.5}, {"step": 8, "loss": math.nan}]
    panel, *others = stage_panels(read_curves({"bridge": stage(log=log), "contrastive": stage(log=log[1:])}))
    assert (panel.lines[0].points, others) == ([(7, 1.5)], [])
    assert len(re.findall(r'id="stage-0-xtick_\d+"', panel.svg)) == 1
    assert ">7</text>" in panel.svg


def test_measures_of_one_point_have_a_value_and_no_chart() -> None:
    contrastive = stage(log=[{"step": 9, "alignment": -1.5}])
    (measure,) = measures(read_curves({"bridge": stage("alignment"), "contrastive": contrastive}))
    assert measure.lasts == [("bridge", "0.995"), ("contrastive", "−1.5")]
    assert [panel.title for panel in measure.panels] == ["bridge"]


def test_many_points_are_smoothed_without_moving_a_line() -> None:
    level = [(step, 2.0) for step in range(100)]
    noise = list(enumerate(np.random.default_rng(0).normal(size=200).tolist()))
    assert (smoothed(level), smoothed(noise[:59])) == (level, noise[:59])
    assert np.std(smoothed(noise), axis=0)[1] < np.std(noise, axis=0)[1] / 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (252, "4 min 12 s"), (3599.7, "1 h 0 min"), (3905, "1 h 5 min")],
)
def test_durations_are_rounded_once(seconds: float, text: str) -> None:
    assert duration(seconds) == text
