import math
import re

import numpy as np
import pytest
from run_records import log, stage

from cocoa_embed.report.charts import Curve, measures, plateau_panel, read_curves, smoothed, stage_panels
from cocoa_embed.report.words import MATCHING, NO_IMAGE, SHUFFLED, duration, token_text

pytest.importorskip("matplotlib")


def curves(**stages: dict[str, object]) -> list[Curve]:
    return read_curves(stages, {})


def test_curves_hold_losses_accuracies_and_measures_of_stages_that_have_begun() -> None:
    logged = stage("loss", "new_loss", "learning_rate", "train_loss", "seen_accuracy", "alignment", MATCHING)
    stages = {"bridge": logged, "contrastive": stage("loss"), "later": stage(log=[])}
    found = read_curves(stages, {"other": {"stages": {"contrastive": stage("loss")}}})
    assert [(curve.stage, list(curve.compared)) for curve in found] == [("bridge", []), ("contrastive", ["other"])]
    assert list(found[0].series) == ["loss", "new_loss", "seen_accuracy", "alignment", MATCHING]


def test_values_that_are_not_finite_are_left_out() -> None:
    values = [1.0, math.nan, math.inf, 0.5]
    lines = [{"step": step, "loss": value} for step, value in enumerate(values, 1)]
    (panel,) = stage_panels(curves(bridge=stage(log=lines)))
    assert panel.lines[0].points == [(1, 1.0), (4, 0.5)]
    assert stage_panels(curves(bridge=stage(log=lines[1:3]))) == []


def test_losses_and_accuracies_of_a_stage_have_a_panel_each_and_probes_their_own() -> None:
    warmup = stage("loss", "mntp_loss", "mae_loss", "masked_token_accuracy")
    found = curves(warmup=warmup, bridge=stage("loss", MATCHING))
    panels = stage_panels(found)
    shown = [(panel.title, panel.quantity, len(panel.lines)) for panel in panels]
    assert shown == [("warmup", "loss", 3), ("warmup", "accuracy", 1), ("bridge", "loss", 1)]
    assert panels[0].detail == "495 steps in 1 min 15 s"
    assert "var(--total)" in panels[0].svg
    assert "#0102" not in panels[0].svg, "the colours are those of the page"
    assert plateau_panel(found) is None


def test_a_total_loss_of_one_part_is_drawn_once() -> None:
    same = [{**line, "mntp_loss": line["loss"]} for line in log("loss")]
    (panel,) = stage_panels(curves(warmup=stage(log=same)))
    assert [line.label for line in panel.lines] == ["masked tokens: cross-entropy"]


@pytest.mark.parametrize("names", [(MATCHING, SHUFFLED), (MATCHING, SHUFFLED, NO_IMAGE)])
def test_the_plateau_has_a_line_for_each_probe(names: tuple[str, ...]) -> None:
    panel = plateau_panel(curves(bridge=stage("loss", *names)))
    assert panel is not None
    assert len(panel.lines) == len(names)


def test_measures_of_one_point_have_a_value_and_no_chart() -> None:
    contrastive = stage(log=[{"step": 9, "alignment": -1.5}])
    (measure,) = measures(curves(bridge=stage("alignment"), contrastive=contrastive))
    assert measure.lasts == [("bridge", "0.995"), ("contrastive", "−1.5")]
    assert [panel.title for panel in measure.panels] == ["bridge"]


def test_a_single_point_has_one_tick_at_its_step() -> None:
    (panel,) = stage_panels(curves(bridge=stage(log=[{"step": 7, "loss": 1.5}])))
    assert len(re.findall(r'id="stage-0-xtick_\d+"', panel.svg)) == 1
    assert ">7</text>" in panel.svg


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


@pytest.mark.parametrize(("token", "text"), [(" red", "red"), ("red", "red"), (" ", "␣"), ("\n", "⏎"), ("", "∅")])
def test_white_space_alone_is_visible(token: str, text: str) -> None:
    assert token_text(token) == text
